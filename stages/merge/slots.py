"""The values of slots, from a layer plan: weighted sums of experts, of chosen neurons of experts, or neurons joined.

Dimensions: F neurons of an expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.checkpoint.reader import TensorReader
from stages.checkpoint.weighted_sum import combined, pooled
from stages.contracts.layer_plan import Member, Slot, neuron_places, pooled_places
from stages.contracts.tensors import TensorRow
from stages.io.storage import is_remote
from stages.merge.blocks import ComputedMean, Mean, PlainMean, Stretch
from stages.merge.neurons import Chosen, SideBySide


@dataclass(frozen=True)
class ExpertTensors:
    """One of the matrices (or biases) that every expert has.

    row: of its tensor on disk: one expert's, or that of all, with the experts along its first axis. dtype: of what is written.
    place: for messages. written: shape of one expert's part in what is written, where neurons may be fewer.
    """

    row: TensorRow
    source: TensorReader
    dtype: torch.dtype
    place: str
    written: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one expert's part."""
        return self.row.shape if self.row.expert_axis is None else self.row.shape[1:]

    def name(self, expert: int) -> str:
        """Name of the tensor that holds an expert's part."""
        return self.row.name if self.row.template is None else self.row.template.format(expert)

    def stretch(self, expert: int) -> Stretch | None:
        """Where an expert's part lies; None where it is quantised."""
        entry = self.source.checkpoint.tensors[self.name(expert)]
        path = self.source.checkpoint.folder / entry.file
        if entry.packing is not None:
            return None
        if self.row.expert_axis is None:
            return Stretch(path, entry.begin, entry.num_bytes)
        num_bytes = entry.num_bytes // entry.shape[0]
        return Stretch(path, entry.begin + expert * num_bytes, num_bytes)

    def values(self, expert: int) -> Tensor:
        """An expert's part, in memory."""
        if self.row.expert_axis is None:
            return self.source.read(self.name(expert))
        return self.source.slices(self.row.name)[expert : expert + 1][0]  # type: ignore[no-any-return]

    def indices(self, member: Member) -> list[Tensor]:
        """Indices of a member's neurons along their axis: one list, or two, of gates and of ups, where all gates come first."""
        axis = self.row.neuron_axis
        assert axis is not None, self.row.name
        try:
            places = neuron_places(member.neurons, self.shape[axis], self.row.neuron_order)
        except ValueError as e:
            raise ValueError(f"{self.place}: {e}") from e
        return [torch.from_numpy(indices) for indices in places]

    def means(self, slot: Slot) -> Iterator[Mean]:
        """The bytes of a slot's part, one mean after another. Raises ValueError where the plan does not fill its shape."""
        axis = self.row.neuron_axis
        if axis is not None and slot.members[0].places is not None:
            yield self._pooled(slot, axis)
            return
        is_chosen = slot.is_joined or any(member.neurons is not None for member in slot.members)
        if axis is None or (not is_chosen and self.written == self.shape):
            yield self._whole(slot.members)
            return
        pieces = _pieces(slot, [self.indices(member) for member in slot.members])
        for bound in (min, max):  # the parts of a piece are added up, so they must be equally long
            num_chosen = sum(bound(len(part.index) for part in piece) for piece in pieces)
            if num_chosen != self.written[axis]:
                raise ValueError(
                    f"{self.place}: the layer plan fills {num_chosen} of {self.written[axis]} places of "
                    f"neurons; mend the method that made the plan"
                )
        experts = [member.expert for member in slot.members]
        if any(self.stretch(expert) is None for expert in experts) or is_remote(self.source.checkpoint.folder):
            yield self._in_memory(pieces, axis)
        elif slot.is_joined and axis == 1:
            (parts,) = zip(*pieces, strict=True)
            yield PlainMean([(SideBySide([self._chosen(part, axis) for part in parts]), 1.0)], self.dtype, self.place)
        else:
            for piece in pieces:
                members = [(SideBySide([self._chosen(part, axis)]), part.weight) for part in piece]
                yield PlainMean(members, self.dtype, self.place)

    def slot_values(self, slot: Slot) -> Tensor:
        """A slot's part in memory, for what is quantised: of the shape of one expert's part, in `dtype`."""
        (mean,) = self.means(slot)
        assert isinstance(mean, ComputedMean), self.place
        return combined(list(mean.members), self.dtype, self.place)

    def _whole(self, members: Sequence[Member]) -> Mean:
        """The weighted sum of whole experts."""
        stretches = [(self.stretch(member.expert), member.weight) for member in members]
        plain = [(stretch, weight) for stretch, weight in stretches if stretch is not None]
        if len(plain) == len(members):
            return PlainMean(plain, self.dtype, self.place)
        computed = ((self.values(member.expert), member.weight) for member in members)
        return ComputedMean(computed, len(members), self.dtype, self.place)

    def _pooled(self, slot: Slot, axis: int) -> Mean:
        """Neurons averaged at their places, in memory: a slot's part in float32, and one member at a time."""
        try:
            placed = pooled_places(slot, self.shape[axis], self.row.neuron_order)
        except ValueError as e:
            raise ValueError(f"{self.place}: {e}") from e

        def computed() -> Iterator[tuple[Tensor, float]]:
            members = (
                (self.values(member.expert), torch.from_numpy(places), torch.from_numpy(shares))
                for member, (places, shares) in zip(slot.members, placed, strict=True)
            )
            yield pooled(members, axis, self.dtype, self.place), 1.0

        return ComputedMean(computed(), 1, self.dtype, self.place)

    def _chosen(self, part: "_Part", axis: int) -> Chosen:
        stretch = self.stretch(part.expert)
        assert stretch is not None
        chosen = Chosen(stretch, self.shape[0], self.dtype.itemsize)
        return replace(chosen, rows=part.index) if axis == 0 else replace(chosen, columns=part.index)

    def _in_memory(self, pieces: Sequence[Sequence["_Part"]], axis: int) -> Mean:
        """One slot's part at a time, for what is quantised or comes from object storage."""

        def computed() -> Iterator[tuple[Tensor, float]]:
            done = [
                combined([(self.values(part.expert).index_select(axis, part.index), part.weight) for part in piece],
                         self.dtype, self.place)
                for piece in pieces
            ]  # fmt: skip
            yield torch.cat(done, dim=axis), 1.0

        return ComputedMean(computed(), 1, self.dtype, self.place)


@dataclass(frozen=True)
class _Part:
    """Some places of an expert on the axis of neurons."""

    expert: int
    weight: float
    index: Tensor


def _pieces(slot: Slot, indices: Sequence[Sequence[Tensor]]) -> list[list[_Part]]:
    """What a slot is made of along the axis of neurons, one piece after another; the parts of a piece are added up.

    indices: by member; with all gates first, two of each. Joined neurons are copied, whatever the members' weights.
    """
    if slot.is_joined:
        pairs = list(zip(slot.members, indices, strict=True))
        return [[_Part(member.expert, 1.0, lists[half])] for half in range(len(indices[0])) for member, lists in pairs]
    return [
        [
            _Part(member.expert, member.weight, torch.cat(list(lists)))
            for member, lists in zip(slot.members, indices, strict=True)
        ]
    ]
