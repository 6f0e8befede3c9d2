"""Products of a layer's weights. They do not depend on tokens, so they are computed once for all domains.

Dimensions: E experts, F intermediate size, R values of a block.
"""

from functools import cached_property

import torch

from stages.contracts.arrow import Array
from stages.model.expert_weights import ExpertWeights

_GRAM_VALUES = 1 << 22
"""Values of all experts that are converted to float64 at a time for their inner products: 32 MiB."""


class WeightProducts:
    """weights: of the experts of one layer."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights = weights

    @cached_property
    def down_square_norms(self) -> Array:
        """Squared norms of the columns of W_down, float64 [E, F]: for each neuron."""
        norms = [self.weights.down_square_norms(expert) for expert in range(self.weights.num_experts)]
        return torch.stack(norms).cpu().numpy()

    @cached_property
    def gram(self) -> Array:
        """Inner products of all weights and biases of the experts, float64 [E, E].

        Blocks of equal rows of all experts' matrices are converted to float64 together, never a whole matrix of all.
        """
        weights = self.weights
        gram_EE = torch.zeros(weights.num_experts, weights.num_experts, dtype=torch.float64, device=weights.device)
        for name in (weights.layout.first, "down_proj"):
            experts = range(weights.num_experts)
            by_expert = [[matrix for _, matrix in weights.matrices(name, expert, expert + 1)] for expert in experts]
            for matrices in zip(*by_expert, strict=True):
                width = matrices[0].shape[0]
                rows = max(1, _GRAM_VALUES // (weights.num_experts * width))
                for blocks in zip(*(matrix.T.split(rows) for matrix in matrices), strict=True):
                    block_ER = torch.stack([block.double().flatten() for block in blocks])
                    gram_EE.addmm_(block_ER, block_ER.T)
                    weights.release(name, 0, weights.num_experts)
            bias = weights.bias(name, 0, weights.num_experts)
            if bias is not None:
                bias_ER = bias.double().view(weights.num_experts, -1)
                gram_EE.addmm_(bias_ER, bias_ER.T)
        return gram_EE.cpu().numpy()
