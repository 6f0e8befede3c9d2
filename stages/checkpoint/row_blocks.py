"""Weights of all experts of a layer, some rows of a matrix at a time, and their inner products: no expert is in memory whole.

Dimensions: E experts, R values of a block, an equal part of each expert.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.checkpoint.codec import dequantise
from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.headers import TensorEntry
from stages.checkpoint.reader import RangeView
from stages.checkpoint.schemes import GROUPS, SCALES, WEIGHT, ZERO_POINTS, Scheme
from stages.contracts.arrow import Array
from stages.contracts.tensors import TensorRow

_BLOCK_VALUES = 1 << 25
"""Values of all experts that are held as float32 at a time, 128 MiB; more where `_LEAST_ROWS` rows of each take more."""
_PRODUCT_VALUES = 1 << 22
"""Values of all experts that are converted to float64 at a time, 32 MiB."""
_LEAST_ROWS = 32
"""Rows of a packed matrix that are unpacked together at least: so many rows of zero points fill whole words."""


def weight_gram(checkpoint: Checkpoint, rows: Sequence[TensorRow], num_experts: int) -> Array:
    """Inner products of all weights and biases of a layer's experts, float64 [E, E].

    rows: the layer's tensors of experts, one for each matrix or bias: that of expert 0, or of all experts, which then lie along
    its first axis.
    """
    gram_EE = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    for row in rows:
        for block_ER in _blocks([_stored(checkpoint, row, expert) for expert in range(num_experts)]):
            for some_ER in block_ER.split(max(1, _PRODUCT_VALUES // num_experts), dim=1):
                values_ER = some_ER.double()
                gram_EE.addmm_(values_ER, values_ER.T)
    return gram_EE.numpy()


def _blocks(experts: Sequence["_StoredRows"]) -> Iterator[Tensor]:
    """The values float32 [E, R] of equal rows of all experts, block after block in the same memory."""
    one = experts[0]
    width = max(1, one.num_values // one.num_rows)
    num_rows = max(1, _BLOCK_VALUES // (len(experts) * width) // one.step) * one.step
    memory = torch.empty(len(experts), min(num_rows * width, one.num_values))
    for first in range(0, one.num_rows, num_rows):
        stop = min(first + num_rows, one.num_rows)
        block_ER = memory[:, : (stop - first) * width]
        for values_R, expert in zip(block_ER, experts, strict=True):
            values_R.copy_(expert.read(first, stop).flatten())
        yield block_ER


@dataclass(frozen=True)
class _StoredRows:
    """A matrix or bias of one expert. Its rows are those of its numbers as they are stored, which some schemes transpose.

    parts: where it lies, by part of the scheme. scheme: None for plain numbers.
    """

    parts: Mapping[str, RangeView]
    scheme: Scheme | None
    num_values: int

    @property
    def num_rows(self) -> int:
        """Rows that are stored."""
        return self.parts[WEIGHT].get_shape()[0]

    @property
    def step(self) -> int:
        """Blocks begin at multiples of so many rows, so that none begins or ends within a word, nor spans scales in part."""
        if self.scheme is None:
            return 1
        rows = [rows for rows, _ in _proportions(self.scheme).values() if rows % _LEAST_ROWS]
        return math.lcm(_LEAST_ROWS, *rows)

    def read(self, first: int, stop: int) -> Tensor:
        """Values float32 of rows [first, stop)."""
        if self.scheme is None:
            return self.parts[WEIGHT][first:stop].float()
        return dequantise(self.scheme, {part: view[self._cut(part, first, stop)] for part, view in self.parts.items()})

    def _cut(self, part: str, first: int, stop: int) -> slice:
        """What of a part belongs to some rows of the numbers."""
        assert self.scheme is not None
        shape, proportions = self.parts[part].get_shape(), _proportions(self.scheme)
        in_any_order = GROUPS in self.parts and part in (SCALES, ZERO_POINTS)
        if part not in proportions or not shape or shape[0] == 1 or in_any_order:
            return slice(None)
        rows, count = proportions[part]
        return slice(first * count // rows, min(shape[0], -(-stop * count // rows)))


def _proportions(scheme: Scheme) -> dict[str, tuple[int, int]]:
    """By part, to how many rows of the numbers how many of its own belong. A part that is not here belongs to all."""
    found = {WEIGHT: (1, 1), SCALES: (1, 1), ZERO_POINTS: (1, 1)}
    if scheme.name == "fp8":
        found[SCALES] = (scheme.block[0], 1)
    elif scheme.name == "int":
        found[ZERO_POINTS] = (32, scheme.num_bits)
    elif scheme.name == "awq":
        found[SCALES] = found[ZERO_POINTS] = (scheme.block[1], 1)
    elif scheme.name == "gptq":
        per_word = 32 // scheme.num_bits
        found[SCALES] = found[ZERO_POINTS] = (max(1, scheme.block[1] // per_word), 1)
        found[GROUPS] = (1, per_word)
    return found


def _stored(checkpoint: Checkpoint, row: TensorRow, expert: int) -> _StoredRows:
    entry = checkpoint.tensors[row.values if row.values_template is None else row.values_template.format(expert)]
    packing, place = entry.packing, None if row.expert_axis is None else expert
    parts = packing.parts if packing is not None else {WEIGHT: entry}
    views = {part: _view(checkpoint, one, place) for part, one in parts.items()}
    num_values = entry.num_elements if place is None else entry.num_elements // entry.shape[0]
    return _StoredRows(views, packing.scheme if packing is not None else None, num_values)


def _view(checkpoint: Checkpoint, entry: TensorEntry, expert: int | None) -> RangeView:
    """A tensor, or an expert's part of one that all experts lie in."""
    if expert is not None:
        num_bytes = entry.num_bytes // entry.shape[0]
        begin = entry.begin + expert * num_bytes
        entry = replace(entry, shape=entry.shape[1:], begin=begin, num_bytes=num_bytes)
    return RangeView(checkpoint.folder / entry.file, entry)
