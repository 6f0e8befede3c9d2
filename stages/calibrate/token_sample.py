"""A sample of calibration tokens for evidence that is kept token by token: the same tokens however the calibration set is cut
into token shards. No torch.

Dimensions: N sampled tokens.
"""

from dataclasses import dataclass

import numpy as np

from stages.contracts.arrow import Array

RULE = "one of each stretch"
"""The rule by which tokens are chosen, for keys: evidence from another one must not be reused."""


@dataclass(frozen=True)
class ShardPlace:
    """A token shard in its domain of the calibration set, or in the whole set if there are no domains.

    num_tokens: of the shard. first: index in the domain of its first token. domain_tokens: of the domain. domain_sequences,
    all_sequences: of the domain and of the set, which decide the domain's share of a sample. seed: of the calibration set.
    """

    num_tokens: int
    first: int
    domain_tokens: int
    domain_sequences: int
    all_sequences: int
    seed: int


def num_sampled(most: int, domain_tokens: int, domain_sequences: int, all_sequences: int) -> int:
    """N of a domain: its share of the tokens that are kept at most, one at least, all if it has no more."""
    return min(domain_tokens, max(1, most * domain_sequences // all_sequences))


@dataclass(frozen=True)
class TokenSample:
    """The sampled tokens of one token shard. places_N: ascending, counted from the shard's first token."""

    places_N: Array

    @classmethod
    def of(cls, place: ShardPlace, most: int) -> "TokenSample":
        """One token at random from each of N stretches of the domain that are equal up to one token. Random, so that they are
        not at the same few places of every sequence. most: tokens of the calibration set, at most."""
        count = num_sampled(most, place.domain_tokens, place.domain_sequences, place.all_sequences)
        bounds = np.arange(count + 1) * place.domain_tokens // count
        chance = np.random.default_rng(place.seed).random(count)
        places = bounds[:-1] + (chance * np.diff(bounds)).astype(np.int64)
        low, high = np.searchsorted(places, (place.first, place.first + place.num_tokens))
        return cls(places[low:high] - place.first)

    def within(self, num_seen: int, num_tokens: int) -> tuple[int, Array]:
        """The sampled ones of the next num_tokens tokens, counted from the first of them, and how many came before."""
        low, high = np.searchsorted(self.places_N, (num_seen, num_seen + num_tokens))
        return int(low), self.places_N[low:high] - num_seen
