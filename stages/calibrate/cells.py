"""Cells: the parts of the calibration text that sums are kept for, and the tokens that un-routed sums run over.

Without sampling there is one cell of all tokens. Under sampling the cells are groups of sequences. Both follow from settings.

Dimensions: T tokens of a micro-batch, S sampled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.spec import SampleArgs


class Cells(Protocol):
    """How tokens fall to cells. Tokens come sequence by sequence; num_seen counts those of the token shard so far."""

    @property
    def num_cells(self) -> int:
        """Number of cells, the same for every token shard."""

    @property
    def is_whole(self) -> bool:
        """Whether there is one cell, and un-routed sums run over all tokens."""

    def unrouted(self, num_seen: int, num_tokens: int) -> Sequence[tuple[int, Tensor]]:
        """For the next num_tokens tokens, whole sequences: each cell and the indices [S] of the tokens to sum up for it."""

    def of_tokens(self, num_seen: int, num_tokens: int) -> Tensor:
        """The cell of each of the next num_tokens tokens, int64 [T]."""


@dataclass(frozen=True)
class AllTokens:
    """One cell of all tokens."""

    num_cells: int = 1
    is_whole: bool = True

    def unrouted(self, num_seen: int, num_tokens: int) -> Sequence[tuple[int, Tensor]]:
        """All of them, for the one cell."""
        return [(0, torch.arange(num_tokens))]

    def of_tokens(self, num_seen: int, num_tokens: int) -> Tensor:
        """Cell 0 for every token."""
        return torch.zeros(num_tokens, dtype=torch.int64)


ALL_TOKENS = AllTokens()


@dataclass(frozen=True)
class Sample:
    """Evenly spaced tokens of each sequence from a random start, and sequences dealt to groups at random; a cell is a group.

    fraction: of a sequence's tokens, at least one is taken. first_sequence: of the token shard that is watched.
    """

    fraction: float
    num_groups: int
    num_sequences: int
    sequence_length: int
    seed: int
    first_sequence: int

    @classmethod
    def of(cls, args: SampleArgs, shard: int) -> "Sample":
        """The sample of a token shard."""
        first = shard * args.sequences_per_shard
        return cls(args.fraction, args.groups, args.num_sequences, args.sequence_length, args.seed, first)

    @property
    def num_cells(self) -> int:
        """Number of groups."""
        return self.num_groups

    @property
    def is_whole(self) -> bool:
        """Never: even where all tokens are sampled, they fall to groups."""
        return False

    def positions(self, sequence: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The sampled positions in a sequence, ascending."""
        count = max(1, round(self.fraction * self.sequence_length))
        start = int(np.random.default_rng([self.seed, sequence]).integers(self.sequence_length))
        return np.sort((start + np.arange(count) * self.sequence_length // count) % self.sequence_length)

    def group(self, sequence: int) -> int:
        """The group of a sequence; groups differ in size by at most one sequence."""
        return int(np.random.default_rng(self.seed).permutation(self.num_sequences)[sequence]) % self.num_groups

    def _sequences(self, num_seen: int, num_tokens: int) -> range:
        assert num_seen % self.sequence_length == num_tokens % self.sequence_length == 0
        first = self.first_sequence + num_seen // self.sequence_length
        return range(first, first + num_tokens // self.sequence_length)

    def unrouted(self, num_seen: int, num_tokens: int) -> Sequence[tuple[int, Tensor]]:
        """Each group and the indices [S] of the sampled tokens of its sequences."""
        by_group: dict[int, list[Tensor]] = {}
        for number, sequence in enumerate(self._sequences(num_seen, num_tokens)):
            indices = torch.from_numpy(self.positions(sequence) + number * self.sequence_length)
            by_group.setdefault(self.group(sequence), []).append(indices)
        return [(group, torch.cat(parts)) for group, parts in sorted(by_group.items())]

    def of_tokens(self, num_seen: int, num_tokens: int) -> Tensor:
        """The group of each token's sequence, sampled or not."""
        groups = torch.tensor([self.group(sequence) for sequence in self._sequences(num_seen, num_tokens)])
        return groups.repeat_interleave(self.sequence_length)
