"""The same statistics with un-routed sums over sampled tokens only; routed outputs, counts, gates and router sums stay exact.

Dimensions: T tokens, C sampled tokens, D hidden size, F intermediate size, E experts, G groups of sequences, k experts a token.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stages.calibrate.sampling import Sample
from stages.calibrate.statistics import InputGatedStatistics, LayerStatistics
from stages.common.tables import PartialStatistics


class _GroupSums:
    """Activation sums of sampled tokens, group by group."""

    def __init__(self, watched: LayerStatistics, sample: Sample) -> None:
        self.watched, self.sample = watched, sample
        num_experts, intermediate = watched.activation_sum_EF.shape
        self.num_sampled_G = np.zeros(sample.num_groups, dtype=np.int64)
        self.activation_sum_EGF = watched.activation_sum_EF.new_zeros(num_experts, sample.num_groups, intermediate)

    def add(self, hidden_TD: Tensor) -> None:
        """Run every expert on the sampled tokens of a micro-batch; before its tokens are counted."""
        for group, chosen_C in self.sample.chosen(self.watched.num_tokens, len(hidden_TD)):
            hidden_CD = hidden_TD[chosen_C.to(hidden_TD.device)]
            self.num_sampled_G[group] += len(chosen_C)
            for expert in range(len(self.activation_sum_EGF)):
                a_CF = self.watched._activation(hidden_CD, expert)
                self.activation_sum_EGF[expert, group] += a_CF.sum(0, dtype=torch.float32).double()

    def into(self, part: PartialStatistics) -> PartialStatistics:
        """The statistics with these sums."""
        sums = self.activation_sum_EGF.cpu().numpy()
        return replace(part, num_sampled_G=self.num_sampled_G, activation_sum_EGF=sums)


class SampledStatistics(LayerStatistics):
    """Watches a layer; an expert runs on the tokens that are routed to it, and on sampled ones."""

    def __init__(self, layer: int, experts: Any, router: nn.Module, score: str, sample: Sample) -> None:
        super().__init__(layer, experts, router, score)
        self._sums = _GroupSums(self, sample)

    def _forward_routed(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        self._sums.add(hidden_TD)
        self.num_tokens += hidden_TD.shape[0]
        dtype = torch.promote_types(hidden_TD.dtype, top_k_weights_Tk.dtype)
        gated_TkD = torch.zeros((*top_k_index_Tk.shape, hidden_TD.shape[1]), dtype=dtype, device=hidden_TD.device)
        for expert in range(self.experts.num_experts):
            tokens, places = torch.where(top_k_index_Tk == expert)
            if not len(tokens):
                continue
            gates = top_k_weights_Tk[tokens, places]
            output = self._linear(self._activation(hidden_TD[tokens], expert), "down_proj", expert)
            gated_TkD[tokens, places] = output * gates[:, None]
            self._add_routed(expert, gates, gates.float() * output.float().norm(dim=-1))
        return gated_TkD.sum(1).to(hidden_TD.dtype)

    def result(self) -> PartialStatistics:
        """The sums so far."""
        return self._sums.into(super().result())


class SampledInputGatedStatistics(InputGatedStatistics):
    """The same where the gate multiplies the expert's input."""

    def __init__(self, layer: int, experts: Any, router: nn.Module, score: str, sample: Sample) -> None:
        super().__init__(layer, experts, router, score)
        self._sums = _GroupSums(self, sample)

    def _forward_blocks(self, gated_rows: Tensor) -> Tensor:
        self._sums.add(self._hidden_TD)
        return super()._forward_blocks(gated_rows)

    def _add_unrouted(self, hidden_TD: Tensor, expert: int) -> Tensor:
        return hidden_TD  # what is summed has been sampled before

    def result(self) -> PartialStatistics:
        """The sums so far."""
        return self._sums.into(super().result())
