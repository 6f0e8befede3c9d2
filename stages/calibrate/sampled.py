"""The same statistics with un-routed sums over sampled tokens only; routed outputs, counts, gates and router sums stay exact.

Dimensions: T tokens, C sampled tokens, D hidden size, F intermediate size, E experts, G groups of sequences, k experts a token,
R routed pairs; in a_CGF, C tokens of a chunk and G experts of a group.
"""

from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from stages.calibrate.partial import PartialStatistics
from stages.calibrate.sampling import Sample
from stages.calibrate.statistics import InputGatedStatistics, LayerStatistics, add_over_tokens
from stages.model.expert_weights import ExpertWeights
from stages.model.routing import Routing


class _Sampled(LayerStatistics):
    """What both kinds of statistics do under sampling: an expert runs on sampled tokens, and on those routed to it."""

    def __init__(self, layer: int, weights: ExpertWeights, router: nn.Module, score: str, sample: Sample) -> None:
        super().__init__(layer, weights, router, score)
        num_experts, intermediate = self.activation_sum_EF.shape
        self.sample, self._group = sample, 0
        self.num_sampled_G = np.zeros(sample.num_groups, dtype=np.int64)
        self.activation_sum_EGF = self.activation_sum_EF.new_zeros(num_experts, sample.num_groups, intermediate)

    def _sum_unrouted(self, hidden_TD: Tensor) -> None:
        """Called before the tokens are counted: how many came before says which sequences these are."""
        for group, chosen_C in self.sample.chosen(self.num_tokens, len(hidden_TD)):
            self._group = group
            self.num_sampled_G[group] += len(chosen_C)
            super()._sum_unrouted(hidden_TD[chosen_C.to(hidden_TD.device)])

    def _add_unrouted(self, first: int, stop: int, a_CGF: Tensor) -> None:
        add_over_tokens(self.activation_sum_EGF[first:stop, self._group], a_CGF)

    def result(self) -> PartialStatistics:
        """The sums so far."""
        sums = self.activation_sum_EGF.cpu().numpy()
        return replace(super().result(), num_sampled_G=self.num_sampled_G, activation_sum_EGF=sums)


class SampledStatistics(_Sampled):
    """Watches a layer whose gates multiply the experts' outputs."""

    def _forward_routed(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        self._sum_unrouted(hidden_TD)
        return super()._forward_routed(hidden_TD, top_k_index_Tk, top_k_weights_Tk)

    def _routed_activations(self, hidden_TD: Tensor, routing: Routing, first: int, stop: int) -> Tensor:
        begin = routing.begin(first)
        rows_RF = self._new_rows(hidden_TD, routing.bounds(first, stop))
        for expert in range(first, stop):
            low, high = routing.begin(expert), routing.begin(expert + 1)
            activations = self._expert_activations(hidden_TD, routing.tokens_R[low:high], expert)
            rows_RF[low - begin : high - begin] = activations[: high - low]
        return rows_RF


class SampledInputGatedStatistics(_Sampled, InputGatedStatistics):
    """Watches a layer whose gates multiply the experts' inputs."""
