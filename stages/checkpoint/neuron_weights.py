"""Similarity of two experts' neurons by their weights, read from the checkpoint.

The permutations belong to pairs of experts within a cluster, which are known only once a method has grouped them. The unit that
plans a layer therefore reads the experts of its clusters of several members itself, two at a time and a matrix at a time:
calibrate, which holds the weights, would have to keep E (E - 1) / 2 matrices [F, F] for the few that are needed.

Dimensions: E experts, F neurons of an expert, R weights of a neuron in one matrix.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.reader import TensorReader
from stages.checkpoint.schemes import WEIGHT
from stages.contracts.arrow import Array
from stages.contracts.tensors import TensorRow, read_tensors

_COLUMNS = 1024
"""Weights of a neuron that are converted to float32 at a time."""


class NeuronWeights(AbstractContextManager["NeuronWeights"]):
    """The experts of one layer on disk. Use as a context manager.

    tensors_file: the table of the checkpoint's tensors. Any layout of experts will do, quantised ones too.
    """

    def __init__(self, model: str, tensors_file: Path, layer: int) -> None:
        self._source = TensorReader(Checkpoint(model))
        of_experts = [
            row
            for row in read_tensors(tensors_file)
            if row.layer == layer and row.role in ("expert", "fused_expert") and row.part in ("", WEIGHT)
        ]
        self._rows: Sequence[TensorRow] = [row for row in of_experts if row.neuron_axis is not None and row.expert in (None, 0)]
        for row in self._rows:
            if row.expert_axis not in (None, 0):
                raise ValueError(f"{self._source.place(row.name)}: the experts are not along its first axis; report the family")

    def __exit__(self, *_: object) -> None:
        self._source.__exit__()

    def between(self, one: int, other: int) -> Array:
        """Inner products float32 [F, F] of all weights of the neurons of two experts: row of gate, row of up, their biases,
        column of W_down. Matching by them minimises the squared distance of the experts (Ainsworth et al., arXiv:2209.04836,
        section 3.2)."""
        total: Array | None = None
        for row in self._rows:
            for one_FR, other_FR in zip(self._parts(row, one), self._parts(row, other), strict=True):
                product_FF = _float(one_FR) @ _float(other_FR).T
                total = product_FF if total is None else np.add(total, product_FF, out=total)
        assert total is not None
        return total

    def _parts(self, row: TensorRow, expert: int) -> Iterator[Tensor]:
        """The weights of an expert's neurons in one tensor, [F, R], some columns at a time; gates and ups in turn."""
        assert row.neuron_axis is not None
        if row.values_template is not None:
            values = self._source.read(row.values_template.format(expert))
        else:
            values = self._source.slices(row.values)[expert : expert + 1][0]
        values = values.movedim(row.neuron_axis, 0).flatten(1) if values.ndim > 1 else values[:, None]
        if row.neuron_order == "halves":
            halves: Sequence[Tensor] = values.chunk(2)
        elif row.neuron_order == "interleaved":
            halves = [values[::2], values[1::2]]
        else:
            halves = [values]
        for half in halves:
            yield from half.split(_COLUMNS, dim=1)


def _float(values: Tensor) -> Array:
    return values.to(torch.float32).contiguous().numpy()
