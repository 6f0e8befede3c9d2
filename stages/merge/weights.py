"""Weighted sums of tensors as they lie on disk: float32 accumulation, one rounding, one member in memory at a time."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stages.common.checkpoint import Checkpoint
from stages.common.errors import InputError
from stages.common.files import DigestingFile
from stages.merge.shares import Shares

_COPY_BYTES = 1 << 24


class SourceTensors:
    """Reads tensors of a checkpoint; each file is opened once. Use as a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "SourceTensors":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def slices(self, name: str) -> Any:
        """A lazy view of a tensor; indexing it reads."""
        file = self.checkpoint.tensors[name].file
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self.checkpoint.folder / file, "pt"))
        return self._files[file].get_slice(name)

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.slices(name)[:]  # type: ignore[no-any-return]

    def copy(self, name: str, out: DigestingFile) -> None:
        """Write a tensor's bytes as they are."""
        entry = self.checkpoint.tensors[name]
        with open(self.checkpoint.folder / entry.file, "rb") as raw:
            raw.seek(entry.begin)
            left = entry.num_bytes
            while left:
                chunk = raw.read(min(left, _COPY_BYTES))
                left -= len(chunk)
                out.write(chunk)


def write_tensor(out: DigestingFile, tensor: Tensor) -> None:
    """Write a tensor's values, row-major, little-endian."""
    out.write(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)


def weighted_sum(members: Iterator[tuple[Tensor, float]], dtype: torch.dtype, place: str) -> Tensor:
    """Sum of share * member in float32, rounded once to dtype. Raises InputError where it is not finite."""
    total: Tensor | None = None
    for tensor, share in members:
        if total is None:
            total = torch.zeros(tensor.shape, dtype=torch.float32)
        total.add_(tensor.float(), alpha=share)
    assert total is not None
    if not torch.isfinite(total).all():
        raise InputError(f"{place}: the merged expert is not finite; a source expert holds NaN or infinity")
    return total.to(dtype)


def merge_rows(tensor: Tensor, axis: int, shares: list[Shares], place: str) -> Tensor:
    """Combine a tensor along its expert axis: cluster c's slice is the weighted sum of its members' (one member: a copy)."""
    rows = tensor.movedim(axis, 0)
    merged = [
        rows[cluster[0][0]]
        if len(cluster) == 1
        else weighted_sum(((rows[member], share) for member, share in cluster), tensor.dtype, place)
        for cluster in shares
    ]
    return torch.stack(merged).movedim(0, axis)


def checkpoint_path(folder: Path, file: str, name: str) -> str:
    """How an error names a tensor."""
    return f"{folder / file}: tensor {name}"
