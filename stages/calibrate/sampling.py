"""Which tokens are sampled, and the group of sequences that each belongs to. Follows from settings alone.

Dimensions: T tokens of a micro-batch, C chosen tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Evenly spaced tokens of each sequence from a random start, and sequences dealt to groups at random.

    fraction: of a sequence's tokens, at least one is taken. first_sequence: of the token shard that is watched. Tokens come
    sequence by sequence.
    """

    fraction: float
    num_groups: int
    num_sequences: int
    sequence_length: int
    seed: int
    first_sequence: int

    @classmethod
    def of(cls, args: Mapping[str, Any], shard: int) -> "Sample":
        """args: fraction, groups, num_sequences, sequence_length, sequences_per_shard, seed."""
        first = shard * args["sequences_per_shard"]
        return cls(args["fraction"], args["groups"], args["num_sequences"], args["sequence_length"], args["seed"], first)

    def positions(self, sequence: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The chosen places in a sequence, ascending."""
        count = max(1, round(self.fraction * self.sequence_length))
        start = int(np.random.default_rng([self.seed, sequence]).integers(self.sequence_length))
        return np.sort((start + np.arange(count) * self.sequence_length // count) % self.sequence_length)

    def group(self, sequence: int) -> int:
        """The group of a sequence; groups differ in size by at most one sequence."""
        return int(np.random.default_rng(self.seed).permutation(self.num_sequences)[sequence]) % self.num_groups

    def chosen(self, num_seen: int, num_tokens: int) -> list[tuple[int, Tensor]]:
        """For the next num_tokens tokens after num_seen of the token shard, whole sequences: group, and indices [C] of them."""
        assert num_seen % self.sequence_length == num_tokens % self.sequence_length == 0
        by_group: dict[int, list[Tensor]] = {}
        for number in range(num_tokens // self.sequence_length):
            sequence = self.first_sequence + num_seen // self.sequence_length + number
            indices = torch.from_numpy(self.positions(sequence) + number * self.sequence_length)
            by_group.setdefault(self.group(sequence), []).append(indices)
        return [(group, torch.cat(parts)) for group, parts in sorted(by_group.items())]
