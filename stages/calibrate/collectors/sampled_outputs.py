"""Inner products of the experts' outputs on a sample of tokens, with the tokens' gates and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stages.calibrate.collectors.base import Collector, Kept, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import KeptView
    from stages.contracts.arrow import Array

_MOST_TOKENS = 1024
_MOST_PRODUCTS = 1 << 22
"""Inner products of experts that are kept in one layer: 32 MB."""
_BLOCK_VALUES = 1 << 25
"""Outputs of all experts, in values, that are held at a time."""


class SampledOutputs(Collector):
    """What the layer's output would be under other gates, as far as its norm tells: <E_e(x), E_f(x)> for all pairs of experts.

    Costs every expert's forward on the sampled tokens, which reads the layer's experts once more for each micro-batch, and
    8 E^2 bytes a token on disk: kept are 1,024 tokens of up to 64 experts, 256 of 128, 64 of 256.
    """

    name = "sampled_outputs"
    columns = (
        Column(
            "sampled_output_gram", "for each sampled token, inner products of E_e(x) with every E_f(x), not gated", "[N E]",
            over_domains="weighted_tokens",
        ),
        Column(
            "sampled_gates", "for each sampled token, the weight that the model gave the expert, 0 if not routed", "[N]",
            over_domains="tokens",
        ),
        Column("sampled_logits", "for each sampled token, the router's logit", "[N]", over_domains="tokens"),
        Column(
            "router_choice_bias", "added to the expert's score where the router picks experts, not to its gate",
            over_domains="same",
        ),
    )  # fmt: skip

    def keeps(self, num_experts: int, num_neurons: int) -> Kept:
        """As many tokens as fit. Logits and gates are few beside the products."""
        num_values = num_experts**2
        return Kept(max(1, min(_MOST_TOKENS, _MOST_PRODUCTS // num_values)), num_values, 8, "inner products of experts")

    def observe_kept(self, sums: Sums, kept: KeptView) -> None:
        """Run every expert on these tokens, a block at a time."""
        import torch

        num_experts, hidden_size = len(sums["sampled_gates"]), kept.hidden_TD.shape[1]
        sums["router_choice_bias"].copy_(kept.choice_bias_E)
        sums["sampled_gates"][:, kept.rows] = kept.gates_NE.T.double()
        sums["sampled_logits"][:, kept.rows] = kept.logits_NE.T.double()
        row = kept.rows.start
        for tokens_N in kept.tokens_N.split(max(1, _BLOCK_VALUES // (num_experts * hidden_size))):
            outputs = [kept.forward.outputs_of(kept.hidden_TD, tokens_N, expert) for expert in range(num_experts)]
            output_NED = torch.stack(outputs, dim=1).double()
            sums["sampled_output_gram"][:, row : row + len(tokens_N)] = (output_NED @ output_NED.mT).transpose(0, 1)
            row += len(tokens_N)

    def add(self, one: Mapping[str, Array], other: Mapping[str, Array]) -> Mapping[str, Array]:
        """Tokens of the one shard, then of the next. The bias is the same in both, or zero in one without a sampled token."""
        bias = "router_choice_bias"
        tokens = {name: np.concatenate([values, other[name]], axis=1) for name, values in one.items() if name != bias}
        return {**tokens, bias: np.where(one[bias] != 0, one[bias], other[bias])}
