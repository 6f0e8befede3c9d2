"""Slots of a source that is quantised, written in its own scheme.

A slot that is one expert as it is keeps its packed bytes. Any other one is computed in float32 and packed anew. Every stored
part is a tensor of its own. Where the scales stand before the numbers in the file, a slot is computed twice: after the
first time only its scales are kept, so that memory stays flat.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.checkpoint.reader import STORED_DTYPES, TensorReader
from stages.checkpoint.schemes import WEIGHT, Scheme
from stages.contracts.errors import InputError
from stages.contracts.layer_plan import LayerPlan, Slot
from stages.contracts.tensors import TensorRow
from stages.merge.blocks import ComputedMean, Mean, PlainMean, Stretch
from stages.merge.layout import OutputTensor
from stages.merge.planned_layer import PlannedLayer, slots_of
from stages.merge.slots import ExpertTensors


def is_whole(slot: Slot) -> bool:
    """Whether a slot is one expert of the source as it is."""
    first = slot.members[0]
    takes_all = first.neurons is None and first.places is None and not slot.is_joined
    return len(slot.members) == 1 and first.weight == 1 and takes_all


@dataclass
class SquaredError:
    """Sums over all values of new experts, float64: their squares, and the squares of what packing changes."""

    values: float = 0.0
    error: float = 0.0


@dataclass
class PackedSlots:
    """Packed parts of the slots of one output file. errors: by layer, of the values that it packs."""

    source: TensorReader
    errors: dict[int, SquaredError] = field(default_factory=dict)
    _kept: dict[tuple[str, int], dict[str, Tensor]] = field(default_factory=dict)

    def means(self, tensor: OutputTensor, layer: PlannedLayer) -> Iterator[Mean]:
        """The bytes of one part of a slot, or of all slots of a fused tensor, one mean after another."""
        row, plan = tensor.source, layer.plan
        dtype, place = STORED_DTYPES[tensor.dtype], self.source.place(row.name)
        for number, slot in zip(_numbers(tensor, plan), slots_of(tensor, plan), strict=True):
            if is_whole(slot) and row.parameter not in plan.replaced and tensor.written == self._expert_shape(row):
                stretch = self._stretch(tensor, slot.members[0].expert)
                yield PlainMean([(stretch, 1.0)], dtype, place)
            else:
                made = ((self._made(tensor, layer, number, slot), 1.0) for _ in range(1))
                yield ComputedMean(made, 1, dtype, place)

    def _stretch(self, tensor: OutputTensor, expert: int) -> Stretch:
        """Where an expert's part lies."""
        row, checkpoint = tensor.source, self.source.checkpoint
        entry = checkpoint.raw_tensors[row.name if row.template is None else row.template.format(expert)]
        if row.expert_axis is None:
            return Stretch(checkpoint.folder / entry.file, entry.begin, entry.num_bytes)
        num_bytes = entry.num_bytes // entry.shape[0]
        return Stretch(checkpoint.folder / entry.file, entry.begin + expert * num_bytes, num_bytes)

    def _made(self, tensor: OutputTensor, layer: PlannedLayer, number: int, slot: Slot) -> Tensor:
        row, key = tensor.source, (tensor.source.values, number)
        kept = self._kept.get(key, {})
        if row.part in kept:
            return kept[row.part]
        from stages.checkpoint.codec import dequantise

        values, parts = self._packed(tensor, layer, number, slot)
        self._kept[key] = {part: made for part, made in parts.items() if part != WEIGHT}
        if row.part == WEIGHT and row.role != "mtp":
            scheme = self._scheme(row.values)
            total = self.errors.setdefault(layer.layer, SquaredError())
            total.values += float(values.double().square().sum())
            total.error += float((dequantise(scheme, parts).double() - values.double()).square().sum())
        return parts[row.part]

    def _packed(self, tensor: OutputTensor, layer: PlannedLayer, number: int, slot: Slot) -> tuple[Tensor, dict[str, Tensor]]:
        """Values float32 of a slot's part, and the parts that they are packed into."""
        from stages.checkpoint.codec import quantise

        row, place, scheme = tensor.source, self.source.place(tensor.source.name), self._scheme(tensor.source.values)
        if not scheme.is_written:
            raise InputError(
                f"{place} is packed by {scheme.name}, in which new experts cannot be written; choose a method that prunes, "
                f"without refit, or set export.dtype to bfloat16"
            )
        experts = ExpertTensors(row.of_values("F32"), self.source, torch.float32, place, tensor.written)
        if row.parameter in layer.plan.replaced:
            values = layer.replaced(row.parameter, number, tensor.written).float()
        else:
            values = experts.slot_values(slot)
        packing = self.source.checkpoint.tensors[row.values].packing
        assert packing is not None, row.values
        stored = {part: STORED_DTYPES[entry.dtype] for part, entry in packing.parts.items()}
        return values, quantise(scheme, values, self._members(tensor, slot), stored)

    def _members(self, tensor: OutputTensor, slot: Slot) -> list[dict[str, Tensor]]:
        """The parts of a slot's members, without their numbers."""
        row = tensor.source
        found = []
        for member in slot.members:
            name = row.values if row.values_template is None else row.values_template.format(member.expert)
            expert = None if row.expert_axis is None else member.expert
            found.append(self.source.parts(name, expert, without=(WEIGHT,)))
        return found

    def _expert_shape(self, row: TensorRow) -> tuple[int, ...]:
        """Shape of one expert's values in the source."""
        return row.values_shape if row.expert_axis is None else row.values_shape[1:]

    def _scheme(self, values: str) -> Scheme:
        packing = self.source.checkpoint.tensors[values].packing
        assert packing is not None, values
        return packing.scheme


def _numbers(tensor: OutputTensor, plan: LayerPlan) -> Sequence[int]:
    """Numbers of the slots of `slots_of`."""
    return range(len(plan.slots)) if tensor.slot is None else [tensor.slot]
