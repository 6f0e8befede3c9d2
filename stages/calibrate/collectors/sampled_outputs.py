"""Inner products of the experts' outputs on a sample of tokens, with the tokens' gates and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import SampledView
    from stages.contracts.arrow import Array


class SampledOutputs(Collector):
    """What the layer's output would be under other gates, as far as its norm tells: <E_e(x), E_f(x)> for all pairs of experts.

    Costs every expert's forward on the sampled tokens, which reads the layer's experts once more for each micro-batch, and
    8 E^2 bytes a token on disk; the sample's size is bounded by `stages.calibrate.spec.sampled_tokens`.
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
    keeps_tokens = True

    def observe_sampled(self, sums: Sums, sampled: SampledView) -> None:
        """Fill in the tokens of a block."""
        sums["router_choice_bias"].copy_(sampled.choice_bias_E)
        tokens = slice(sampled.first, sampled.first + len(sampled.gates_NE))
        sums["sampled_gates"][:, tokens] = sampled.gates_NE.T.double()
        sums["sampled_logits"][:, tokens] = sampled.logits_NE.T.double()
        output_NED = sampled.output_END.transpose(0, 1).double()
        sums["sampled_output_gram"][:, tokens] = (output_NED @ output_NED.mT).transpose(0, 1)

    def add(self, one: Mapping[str, Array], other: Mapping[str, Array]) -> Mapping[str, Array]:
        """Tokens of the one shard, then of the next. The bias is the same in both, or zero in one without a sampled token."""
        bias = "router_choice_bias"
        tokens = {name: np.concatenate([values, other[name]], axis=1) for name, values in one.items() if name != bias}
        return {**tokens, bias: np.where(one[bias] != 0, one[bias], other[bias])}
