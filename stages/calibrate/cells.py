"""Cells: disjoint sets of calibration tokens for which sums are kept separately, and the tokens that un-routed sums cover.

Without sampling there is one cell of all tokens. Under sampling each cell is a group of sequences. Settings determine both.
Domains are not cells: no token shard holds tokens of two domains, so sums by token shard are sums by domain.

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
    """Assigns tokens to cells. Tokens arrive in whole sequences; num_seen counts earlier tokens of the same token shard."""

    @property
    def num_cells(self) -> int:
        """Number of cells, the same for every token shard."""

    @property
    def is_whole(self) -> bool:
        """Whether there is a single cell whose un-routed sums cover all tokens."""

    def unrouted(self, num_seen: int, num_tokens: int) -> Sequence[tuple[int, Tensor]]:
        """For the next num_tokens tokens (whole sequences): each cell, and the indices [S] of its tokens in un-routed sums."""

    def of_tokens(self, num_seen: int, num_tokens: int) -> Tensor:
        """Cell of each of the next num_tokens tokens, int64 [T]."""


@dataclass(frozen=True)
class AllTokens:
    """One cell of all tokens."""

    num_cells: int = 1
    is_whole: bool = True

    def unrouted(self, num_seen: int, num_tokens: int) -> Sequence[tuple[int, Tensor]]:
        """The single cell with the indices of all tokens."""
        return [(0, torch.arange(num_tokens))]

    def of_tokens(self, num_seen: int, num_tokens: int) -> Tensor:
        """Cell 0 for every token."""
        return torch.zeros(num_tokens, dtype=torch.int64)


ALL_TOKENS = AllTokens()


@dataclass(frozen=True)
class Sample:
    """Evenly spaced tokens of each sequence, from a random start. Sequences are assigned to groups at random; each group is a
    cell.

    fraction: share of each sequence's tokens; at least one token is taken. num_sequences: of the text, or of one domain of it.
    first_sequence: index among those of the first sequence of the token shard.
    """

    fraction: float
    num_groups: int
    num_sequences: int
    sequence_length: int
    seed: int
    first_sequence: int

    @classmethod
    def of(cls, args: SampleArgs) -> "Sample":
        """The sample of a token shard."""
        return cls(args.fraction, args.groups, args.num_sequences, args.sequence_length, args.seed, args.first_sequence)

    @property
    def num_cells(self) -> int:
        """Number of groups."""
        return self.num_groups

    @property
    def is_whole(self) -> bool:
        """Always False: even if all tokens are sampled, they are split into groups."""
        return False

    def positions(self, sequence: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The sampled positions in a sequence, ascending."""
        count = max(1, round(self.fraction * self.sequence_length))
        start = int(np.random.default_rng([self.seed, sequence]).integers(self.sequence_length))
        return np.sort((start + np.arange(count) * self.sequence_length // count) % self.sequence_length)

    def group(self, sequence: int) -> int:
        """The group of a sequence. Group sizes differ by at most one sequence."""
        return int(np.random.default_rng(self.seed).permutation(self.num_sequences)[sequence]) % self.num_groups

    def _sequences(self, num_seen: int, num_tokens: int) -> range:
        assert num_seen % self.sequence_length == num_tokens % self.sequence_length == 0
        first = self.first_sequence + num_seen // self.sequence_length
        return range(first, first + num_tokens // self.sequence_length)

    def unrouted(self, num_seen: int, num_tokens: int) -> Sequence[tuple[int, Tensor]]:
        """Each group, and the indices [S] of the sampled tokens of its sequences."""
        by_group: dict[int, list[Tensor]] = {}
        for number, sequence in enumerate(self._sequences(num_seen, num_tokens)):
            indices = torch.from_numpy(self.positions(sequence) + number * self.sequence_length)
            by_group.setdefault(self.group(sequence), []).append(indices)
        return [(group, torch.cat(parts)) for group, parts in sorted(by_group.items())]

    def of_tokens(self, num_seen: int, num_tokens: int) -> Tensor:
        """Group of each token's sequence. Tokens that are not sampled have one, too."""
        groups = torch.tensor([self.group(sequence) for sequence in self._sequences(num_seen, num_tokens)])
        return groups.repeat_interleave(self.sequence_length)
