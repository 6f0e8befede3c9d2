"""Chosen neurons of experts, read from a file as if they lay there one after another.

Dimensions: R rows and C columns of one expert's matrix on disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stages.merge.blocks import Stretch


@dataclass(frozen=True)
class Chosen:
    """Some rows or columns of a matrix [R, C] on disk, in any order.

    stretch: the matrix. rows, columns: indices; None for all. A row, or an element of a column, has item_bytes * C bytes, or
    item_bytes.
    """

    stretch: Stretch
    num_rows: int
    item_bytes: int
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and bytes of a row."""
        rows = self.num_rows if self.rows is None else len(self.rows)
        row_bytes = self.stretch.num_bytes // self.num_rows
        return rows, row_bytes if self.columns is None else len(self.columns) * self.item_bytes

    def read_rows(self, first: int, stop: int) -> Tensor:
        """Rows [first, stop) of what was chosen, uint8 [stop - first, bytes of a row]."""
        row_bytes = self.stretch.num_bytes // self.num_rows
        found = torch.empty(stop - first, row_bytes, dtype=torch.uint8)
        chosen = torch.arange(first, stop) if self.rows is None else self.rows[first:stop]
        breaks = (torch.diff(chosen) != 1).nonzero().flatten() + 1
        for begin, end in pairwise([0, *breaks.tolist(), len(chosen)]):  # neighbours are read together
            self.stretch.read(int(chosen[begin]) * row_bytes, found[begin:end].view(-1))
        if self.columns is None:
            return found
        return found.view(stop - first, -1, self.item_bytes)[:, self.columns].flatten(1)


@dataclass(frozen=True)
class SideBySide:
    """Matrices with equally many rows, row beside row; read block by block like a `Stretch`."""

    parts: Sequence[Chosen]

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return self.parts[0].shape[0] * self._row_bytes

    @property
    def _row_bytes(self) -> int:
        return sum(part.shape[1] for part in self.parts)

    def read(self, offset: int, out: Tensor) -> None:
        """Fill uint8 memory from byte `offset` on. Raises InputError for a file that has become shorter."""
        row_bytes = self._row_bytes
        first, stop = offset // row_bytes, -(-(offset + len(out)) // row_bytes)
        rows = torch.cat([part.read_rows(first, stop) for part in self.parts], dim=1)
        begin = offset - first * row_bytes
        out.copy_(rows.view(-1)[begin : begin + len(out)])
