"""Which expert meets which tokens of a micro-batch.

Dimensions: T tokens, k experts a token, R = T k routed pairs of a token and an expert.
"""

import torch
from torch import Tensor


class Routing:
    """The routed pairs of a micro-batch, sorted by expert, then by token.

    slots_R: position of each pair in the flattened [T, k]. tokens_R: its token. rank_R: inverse permutation of slots_R.
    Pairs of expert e in token block b stand at [begin(e, b), begin(e, b + 1)).
    """

    def __init__(self, index_Tk: Tensor, num_experts: int, block: int) -> None:
        num_tokens, top_k = index_Tk.shape
        experts_R = index_Tk.flatten()
        self.slots_R = experts_R.argsort(stable=True)
        self.rank_R = self.slots_R.argsort()
        self.tokens_R = self.slots_R // top_k
        self.num_blocks = -(-num_tokens // block)
        buckets_R = experts_R[self.slots_R] * self.num_blocks + self.tokens_R // block
        ends = torch.bincount(buckets_R, minlength=num_experts * self.num_blocks).cumsum(0)
        self._begins: list[int] = [0, *ends.tolist()]

    def begin(self, expert: int, block: int = 0) -> int:
        """Where the pairs of an expert from a block of tokens on begin; the next expert's first is this one's end."""
        return self._begins[expert * self.num_blocks + block]

    def bounds(self, first: int, stop: int) -> list[int]:
        """Where the pairs of each of the experts [first, stop) begin, counted from the first one's, and the end."""
        return [self.begin(expert) - self.begin(first) for expert in range(first, stop + 1)]
