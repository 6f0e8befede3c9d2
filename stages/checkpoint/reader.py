"""Reads values of tensors: plain tensors as stored, quantised tensors dequantised on reading."""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.headers import TensorEntry
from stages.checkpoint.schemes import Scheme
from stages.io.files import read_into
from stages.io.storage import is_remote

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

STORED_DTYPES = TORCH_DTYPES | {"F8_E8M0": torch.float8_e8m0fnu}
"""Dtypes of parts of packed tensors, too."""


class PackedView:
    """A quantised tensor that dequantises on indexing: the whole tensor, or a range of experts of a fused tensor."""

    def __init__(self, scheme: Scheme, parts: Mapping[str, Any], ndim: int) -> None:
        self._scheme, self._parts, self._ndim = scheme, parts, ndim

    def __getitem__(self, index: Any) -> Tensor:
        if index is Ellipsis:
            index = slice(None)
        assert isinstance(index, slice)
        assert self._ndim == 3 or index == slice(None), "rows of a matrix share scales"
        # a part may be a single number, which has no axis to be cut along
        parts = {part: view[index] if view.get_shape() else view[...] for part, view in self._parts.items()}
        from stages.checkpoint.codec import dequantise  # slow to import, and only quantised sources need it

        return dequantise(self._scheme, parts)


class RangeView:
    """A plain tensor in a file, which may be remote. Indexing reads byte ranges, as `safe_open`'s slices do locally."""

    def __init__(self, path: Path, entry: TensorEntry) -> None:
        self._path, self._entry = path, entry

    def get_shape(self) -> list[int]:
        """Sizes of the axes."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Dtype as safetensors names it."""
        return self._entry.dtype

    def __getitem__(self, index: Any) -> Tensor:
        shape = self._entry.shape
        rows = index if isinstance(index, slice) else slice(None)
        first, stop, step = rows.indices(shape[0]) if shape else (0, 1, 1)
        assert step == 1, "only neighbouring rows are read by one range"
        row_bytes = self._entry.num_bytes // shape[0] if shape and shape[0] else self._entry.num_bytes
        out = torch.empty(max(0, stop - first) * row_bytes, dtype=torch.uint8)
        read_into(self._path, self._entry.begin + first * row_bytes, out.numpy().data)
        values = out.view(STORED_DTYPES[self._entry.dtype]).view((max(0, stop - first), *shape[1:]) if shape else ())
        return values if isinstance(index, slice) or index is Ellipsis else values[index]


class TensorReader:
    """Reads tensors of a checkpoint. Each file is opened once. Use as a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def place(self, name: str) -> str:
        """Name of a tensor for error messages, with its file."""
        entry = self.checkpoint.raw_tensors.get(name) or self.checkpoint.tensors[name]
        return f"{self.checkpoint.folder / entry.file}: tensor {name}"

    def _raw(self, file: str, name: str) -> Any:
        if is_remote(self.checkpoint.folder):
            return RangeView(self.checkpoint.folder / file, self.checkpoint.raw_tensors[name])
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self.checkpoint.folder / file, "pt"))
        return self._files[file].get_slice(name)

    def slices(self, name: str) -> Any:
        """A lazy view of a tensor that reads on indexing. Values of a quantised tensor are float32."""
        entry = self.checkpoint.tensors[name]
        if entry.packing is None:
            return self._raw(entry.file, name)
        views = {part: self._raw(one.file, one.name) for part, one in entry.packing.parts.items()}
        return PackedView(entry.packing.scheme, views, ndim=len(entry.shape))

    def parts(self, name: str, expert: int | None = None, without: Collection[str] = ()) -> dict[str, Tensor]:
        """The parts of a quantised tensor as they are stored: of the whole, or of one expert of a fused tensor.

        They are read into memory of their own. Those of an opened file would be its mapped pages, and count twice once copied.
        """
        packing, folder = self.checkpoint.tensors[name].packing, self.checkpoint.folder
        assert packing is not None, name
        views = {part: RangeView(folder / one.file, one) for part, one in packing.parts.items() if part not in without}
        if expert is not None:
            return {part: view[expert : expert + 1][0] for part, view in views.items()}
        return {part: view[...] for part, view in views.items()}

    def read(self, name: str) -> Tensor:
        """The values of a whole tensor."""
        return self.slices(name)[:]  # type: ignore[no-any-return]
