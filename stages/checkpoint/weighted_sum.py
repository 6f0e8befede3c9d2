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
        _round_into(total, out, place)


def _round_into(total: Tensor, out: Tensor, place: str) -> None:
    out.copy_(total)
    if is_finite(out):
        return
    if is_finite(total):
        raise InputError(f"{place}: the merged expert exceeds {dtype_name(out.dtype)}; set export.dtype to bfloat16")
    raise InputError(
        f"{place}: the merged expert is not finite; a source expert holds NaN or infinity: download the checkpoint again"
    )


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


def pooled(members: Iterable[tuple[Tensor, Tensor, Tensor]], axis: int, dtype: torch.dtype, place: str) -> Tensor:
    """Slices of tensors, along an axis, added up at new places: slice n of a member, times its share n, at its place n.

    float32, rounded once; as many places as the axis has. Raises InputError where the sum is not finite.

    members: tensor, places and shares, both [size of the axis]. Slices of a member that share a place are added one after
    another, because one call would add them in any order on a GPU.
    """
    total: Tensor | None = None
    for tensor, places, shares in members:
        if total is None:
            total = torch.zeros(tensor.shape, device=tensor.device)
        scale = [1] * tensor.ndim
        scale[axis] = -1
        for turn in _turns(places):
            values = tensor.index_select(axis, turn.to(tensor.device)).float()
            values *= shares[turn].float().to(tensor.device).view(scale)
            total.index_add_(axis, places[turn].to(tensor.device), values)
    assert total is not None
    out = torch.empty(total.shape, dtype=dtype, device=total.device)
    _round_into(total, out, place)
    return out


def _turns(places: Tensor) -> list[Tensor]:
    """Indices of places, in turns: none has a place twice, the first has the first index of every place."""
    order = torch.argsort(places, stable=True)
    counts = torch.bincount(places)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    number = torch.arange(len(places)) - first
    return [order[number == turn] for turn in range(int(counts.max()))]


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
