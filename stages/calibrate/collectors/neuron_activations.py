"""Activations of every neuron on a sample of tokens, from which neurons are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Kept, Sum, Sums
from stages.contracts.evidence import Column
from stages.contracts.settings import NEURON_COLUMN

if TYPE_CHECKING:
    from stages.calibrate.observations import KeptView
    from stages.contracts.arrow import Array

_MOST_TOKENS = 4096
_MOST_VALUES = 1 << 26
"""Values that are kept in one layer: 256 MiB of float32."""


class NeuronActivations(Collector):
    """The input of W_down of every expert on a sample of the calibration tokens, routed to the expert or not.

    The correlations of all neurons would be (E F)^2 numbers, 105 GB for a layer of Mixtral-8x7B, of which a merge needs those
    within its clusters, which are not known yet. So the activations themselves are kept, on as many tokens as fit in 256 MiB
    a layer (`stages.calibrate.token_sample`): 585 of Mixtral-8x7B, 682 of Qwen3-30B-A3B, 128 of DeepSeek-V3; all, where there
    are no more, and at most 4,096. The correlations over N tokens have a standard error of up to 1 / sqrt(N). Cost: gate and up
    products of these tokens once more.
    """

    name = "neuron_activations"
    columns = (
        Column(
            NEURON_COLUMN,
            "on a sample of the tokens, in order: the input of W_down, not gated",
            "[N F]",
            dtype="float32",
            over_domains="tokens",
        ),
    )

    @property
    def sums(self) -> tuple[Sum, ...]:
        """One row for each sampled token of the shard."""
        return (Sum("a", "[N F]"),)

    def keeps(self, num_experts: int, num_neurons: int) -> Kept:
        """As many tokens as fit."""
        num_values = num_experts * num_neurons
        return Kept(max(1, min(_MOST_TOKENS, _MOST_VALUES // num_values)), num_values, 4, "activations of all neurons")

    def observe_kept(self, sums: Sums, kept: KeptView) -> None:
        """Keep the activations of these tokens."""
        for expert, a_NF in enumerate(sums["a"]):
            a_NF[kept.rows] = kept.forward.activations_of(kept.hidden_TD, kept.tokens_N, expert)

    def add(self, one: Mapping[str, Array], other: Mapping[str, Array]) -> Mapping[str, Array]:
        """The rows of each token shard as they are, under names of their own: there may be thousands of shards to add up."""
        return {**one, f"a.{len(one)}": other["a"]}

    def finish(self, sums: Mapping[str, Array], summed: object) -> Mapping[str, Array]:
        """The rows of all token shards, in their order."""
        import numpy as np

        return {NEURON_COLUMN: np.concatenate(list(sums.values()), axis=1)}
