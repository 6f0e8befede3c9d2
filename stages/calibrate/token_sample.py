"""A sample of calibration tokens for evidence that is kept token by token.

Dimensions: E experts, N sampled tokens.
"""

from dataclasses import dataclass

import numpy as np

from stages.calibrate.spec import TokenSampleArgs
from stages.contracts.arrow import Array


@dataclass(frozen=True)
class TokenSample:
    """The sampled tokens of one token shard. places_N: ascending, counted from the shard's first token."""

    places_N: Array

    @classmethod
    def of(cls, args: TokenSampleArgs) -> "TokenSample":
        """One token at random from each of `num_sampled` equal stretches of the calibration set, or of each of its domains, so
        that the sample does not depend on how the set is cut into shards."""
        width = max(1.0, args.num_tokens / args.num_sampled)
        starts = np.arange(min(args.num_sampled, args.num_tokens)) * width
        places = np.unique((starts + np.random.default_rng(args.seed).random(len(starts)) * width).astype(np.int64))
        first = args.first_token
        inside = places[(places >= first) & (places < min(first + args.tokens_per_shard, args.num_tokens))]
        return cls(inside - first)

    def within(self, num_seen: int, num_tokens: int) -> tuple[int, Array]:
        """The sampled ones of the next num_tokens tokens, counted from the first of them, and how many came before."""
        low, high = np.searchsorted(self.places_N, (num_seen, num_seen + num_tokens))
        return int(low), self.places_N[low:high] - num_seen


NO_SAMPLE = TokenSample(np.zeros(0, dtype=np.int64))
