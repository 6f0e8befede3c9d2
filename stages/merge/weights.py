"""Weighted sums of tensors as they lie on disk: float32 accumulation, one rounding, one member in memory at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from stages.common.errors import InputError
from stages.common.files import DigestingFile
from stages.merge.shares import Shares


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
