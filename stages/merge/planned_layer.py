"""A layer's plan and the values that it replaces, read when the first of its tensors is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from stages.checkpoint.headers import TensorEntry, read_header
from stages.checkpoint.reader import TORCH_DTYPES
from stages.contracts.layer_plan import LayerPlan, Slot, read_plan
from stages.contracts.paths import plan_file, replaced_file
from stages.io.files import read_into
from stages.merge.layout import OutputTensor


@dataclass(frozen=True)
class PlannedLayer:
    """A layer's plan and what it replaces; read when the first of the layer's tensors is reached."""

    plan_dir: Path
    layer: int

    @cached_property
    def plan(self) -> LayerPlan:
        """What becomes of the layer's experts."""
        return read_plan(plan_file(self.plan_dir, self.layer))

    @cached_property
    def _replaced(self) -> dict[str, TensorEntry]:
        """Where solved values lie, by parameter."""
        path = replaced_file(self.plan_dir, self.layer)
        return {entry.name: entry for entry in read_header(path).entries}

    def replaced(self, parameter: str, slot: int | None, shape: tuple[int, ...]) -> Tensor:
        """Solved values of a parameter: of one slot, or of all. Raises ValueError where they do not have the shape."""
        path, entry = replaced_file(self.plan_dir, self.layer), self._replaced[parameter]
        found = entry.shape if slot is None else entry.shape[1:]
        if found != shape:
            raise ValueError(
                f"{path}: {parameter} has shape {list(found)} where {list(shape)} is needed; run again with --from recombine"
            )
        num_bytes = entry.num_bytes if slot is None else entry.num_bytes // entry.shape[0]
        values = torch.empty(num_bytes, dtype=torch.uint8)
        read_into(path, entry.begin + (slot or 0) * num_bytes, values.numpy().data)
        return values.view(TORCH_DTYPES[entry.dtype]).view(shape)


def slots_of(tensor: OutputTensor, plan: LayerPlan) -> Sequence[Slot]:
    """Slots that have a part in an output tensor."""
    return plan.slots if tensor.slot is None else plan.slots[tensor.slot : tensor.slot + 1]
