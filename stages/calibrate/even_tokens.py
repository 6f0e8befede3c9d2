"""Evenly spaced tokens of the calibration set, or of each of its domains, the same ones however it is cut into token shards.
No torch.

Dimensions: N chosen tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_VALUES = 1 << 26
"""Values of one layer that are kept for the chosen tokens: 256 MiB of float32."""
MOST_TOKENS = 4096


def step_of(num_tokens: int, values_per_token: int, num_domains: int = 1) -> int:
    """Distance of chosen tokens. It is odd, so that they do not stand at the same few places of every sequence. num_tokens: of
    the domain; every domain has an equal share of what is kept, one token at least."""
    most = max(1, min(MOST_TOKENS, MOST_VALUES // values_per_token) // num_domains)
    return 1 if num_tokens <= most else -(-num_tokens // most) | 1


@dataclass(frozen=True)
class EvenTokens:
    """The chosen tokens of one token shard: every `step`-th of its domain, from the domain's first on.

    first: index in the domain of the shard's first token. num_tokens: of the shard.
    """

    step: int
    first: int
    num_tokens: int

    def _rank(self, index: int) -> int:
        """Number of chosen tokens of the domain before the one at an index of the shard."""
        return -(-(self.first + index) // self.step)

    @property
    def num_chosen(self) -> int:
        """N, of the shard."""
        return self._rank(self.num_tokens) - self._rank(0)

    def chosen(self, num_seen: int, num_tokens: int) -> tuple[int, Sequence[int]]:
        """Of the next num_tokens tokens of the shard those that are chosen, and the number of the shard's chosen ones before
        them."""
        rank = self._rank(num_seen)
        return rank - self._rank(0), range(rank * self.step - self.first - num_seen, num_tokens, self.step)
