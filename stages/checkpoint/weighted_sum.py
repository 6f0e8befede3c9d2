"""Weighted sums of tensors as they lie on disk: float32 accumulation, one rounding, one member in memory at a time."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stages.checkpoint.finite import is_finite
from stages.contracts.errors import InputError

_PIECE = 1 << 18
"""Elements that are converted at a time: their float32 values stay in a core's cache. Measured on 4 MiB blocks of bfloat16:
2 to 4 times as fast as converting a whole member."""


class WeightedSum:
    """Sums of share * member, one after another, each over flat tensors of one length; their memory is used again."""

    def __init__(self) -> None:
        self._piece = torch.empty(_PIECE)
        self._memory = torch.empty(0)
        self._total: Tensor | None = None

    def add(self, member: Tensor, share: float) -> None:
        """Add a member of the sum at hand, of any floating-point dtype."""
        if self._total is None:
            if len(self._memory) < len(member):
                self._memory = torch.empty(len(member))
            self._total = self._memory[: len(member)].zero_()
        for total, values in zip(self._total.split(_PIECE), member.split(_PIECE), strict=True):
            total.add_(self._piece[: len(values)].copy_(values), alpha=share)

    def round_into(self, out: Tensor, place: str) -> None:
        """Write the sum, rounded once to the dtype of `out`, and begin a new one. Raises InputError if it is not finite."""
        assert self._total is not None
        total, self._total = self._total, None
        out.copy_(total)
        if is_finite(out):
            return
        if is_finite(total):
            raise InputError(f"{place}: the merged expert exceeds {dtype_name(out.dtype)}; set export.dtype to bfloat16")
        raise InputError(f"{place}: the merged expert is not finite; a source expert holds NaN or infinity")


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as messages and settings name it."""
    return str(dtype).removeprefix("torch.")


def weighted_sum(members: Iterable[tuple[Tensor, float]], dtype: torch.dtype, place: str) -> Tensor:
    """Sum of share * member in float32, rounded once to dtype. Raises InputError where it is not finite."""
    total, shape = WeightedSum(), torch.Size()
    for tensor, share in members:
        shape = tensor.shape
        total.add(tensor.reshape(-1), share)
    out = torch.empty(shape, dtype=dtype)
    total.round_into(out.view(-1), place)
    return out


def merge_rows(tensor: Tensor, axis: int, combinations: Iterable[Sequence[tuple[int, float]]], place: str) -> Tensor:
    """Combine slices of a tensor along an axis: each new one is the weighted sum of some (one alone with weight 1: a copy)."""
    rows = tensor.movedim(axis, 0)
    merged = [combined([(rows[index], weight) for index, weight in parts], tensor.dtype, place) for parts in combinations]
    return torch.stack(merged).movedim(0, axis)


def combined(members: Sequence[tuple[Tensor, float]], dtype: torch.dtype, place: str) -> Tensor:
    """The weighted sum of tensors, rounded once; one alone with weight 1 as it is."""
    if len(members) == 1 and members[0][1] == 1:
        return members[0][0].to(dtype)
    return weighted_sum(members, dtype, place)
