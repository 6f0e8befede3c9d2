"""Assigns the tokens of a micro-batch to experts.

Dimensions: T tokens, k experts a token, R = T k routed pairs of a token and an expert, E experts.
"""

import torch
from torch import Tensor, nn

_CHOICE_BIASES = ("e_score_correction_bias", "expert_bias")
"""Names of what routers add to scores where they pick experts, and not to gates (DeepSeek-V3, arXiv:2412.19437, eq. 16)."""


def choice_bias(layer: nn.Module, num_experts: int) -> Tensor | None:
    """What a decoder layer's router adds to scores where it picks experts, float64 [E]; None for a router without.

    Whoever uses it checks that it explains what the model picks (`stages.cluster.rerouting.rule_of`).
    """
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name.rpartition(".")[2] in _CHOICE_BIASES and tensor.numel() == num_experts:
            return tensor.detach().double().flatten()
    return None


class Routing:
    """The routed pairs of a micro-batch, sorted by expert, then by token.

    slots_R: position of each pair in the flattened [T, k]. tokens_R: its token. rank_R: inverse permutation of slots_R. Pairs
    of expert e in token block b are at [begin(e, b), begin(e, b + 1)).
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
        """First pair of an expert whose token is in this block or a later one.
        The last pair ends where the next expert's first begins."""
        return self._begins[expert * self.num_blocks + block]

    def bounds(self, first: int, stop: int) -> list[int]:
        """First pair of each of the experts [first, stop), relative to that of the first one, and the end."""
        return [self.begin(expert) - self.begin(first) for expert in range(first, stop + 1)]
