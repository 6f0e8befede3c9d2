"""Watches one MoE layer while it runs and passes its values to collectors.

Dimensions: T tokens, D hidden size, E experts, k experts a token, C cells, N sampled tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from stages.calibrate.cells import Cells
from stages.calibrate.collectors.base import Collector
from stages.calibrate.even_tokens import EvenTokens
from stages.calibrate.observations import InputView, RoutedView, RouterView, SampledView, UnroutedView
from stages.calibrate.sums import PartialSums
from stages.calibrate.token_sample import NO_SAMPLE, TokenSample
from stages.model.expert_weights import ExpertWeights
from stages.model.experts_forward import ExpertsForward, RoutedPairs
from stages.model.families import Family
from stages.model.stream import replaced_forward

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
}


_SAMPLED_VALUES = 1 << 25
"""Outputs of all experts on sampled tokens, in values, that are held at a time."""


class Watcher:
    """Replaces the experts' forward inside its context. The layer's output stays the same, up to rounding.

    router: the module that returns the router logits [T, E]. family: states how logits become scores, and whether gates
    multiply inputs or outputs. even: evenly spaced tokens, for a collector that keeps some. sample: tokens that are kept one by
    one, for collectors that ask for them. choice_bias_E: what the router adds to scores where it picks experts; None for
    nothing.
    """

    def __init__(
        self,
        layer: int,
        weights: ExpertWeights,
        router: nn.Module,
        family: Family,
        cells: Cells,
        collectors: Sequence[Collector],
        even: EvenTokens | None = None,
        sample: TokenSample = NO_SAMPLE,
        choice_bias_E: Tensor | None = None,
    ) -> None:
        self.layer, self.weights, self.router = layer, weights, router
        self.cells, self.collectors, self.even, self.sample = cells, collectors, even, sample
        self.choice_bias_E = torch.zeros(weights.num_experts) if choice_bias_E is None else choice_bias_E
        self.forward = ExpertsForward(weights)
        self._score, self._gates_input = SCORES[family.score], family.gates_input
        sizes = {
            "C": cells.num_cells, "D": weights.hidden_size, "E": weights.num_experts, "F": weights.intermediate,
            "M": even.num_chosen if even is not None else 0, "N": len(sample.places_N),
        }  # fmt: skip
        self.sums: dict[str, dict[str, Tensor]] = {
            collector.name: {
                kept.name: torch.zeros(kept.sizes(sizes), dtype=torch.float64, device=weights.device) for kept in collector.sums
            }
            for collector in collectors
        }
        self.num_tokens = 0
        self.num_unrouted_C = np.zeros(cells.num_cells, dtype=np.int64)
        self._replaced = ExitStack()

    def __enter__(self) -> Self:
        forward = self._input_gated if self._gates_input else self._output_gated
        self._replaced.enter_context(replaced_forward(self.weights.experts, forward))
        self._replaced.callback(self.router.register_forward_hook(self._watch_router).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._replaced.close()

    def _watch_router(self, _module: nn.Module, args: Any, output: Any) -> None:
        if self._gates_input:
            self._hidden_TD: Tensor = args[0]
            self._scores_TE, logits = output
        else:
            logits = output[0] if isinstance(output, tuple) else output
        logits_TE = logits.reshape(-1, self.weights.num_experts).float()
        self._logits_TE = logits_TE
        view = RouterView(logits_TE, self._score(logits_TE))
        for collector in self.collectors:
            collector.observe_router(self.sums[collector.name], view)

    def _output_gated(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        see_routed = self._begin(hidden_TD)
        self._see_sampled(hidden_TD, top_k_index_Tk, top_k_weights_Tk)
        parts = (hidden_TD, top_k_index_Tk, top_k_weights_Tk, see_routed)
        if self.cells.is_whole:
            self.num_unrouted_C[0] += len(hidden_TD)
            return self.forward.output_gated(*parts, lambda activations: self._see_unrouted(UnroutedView(activations, 0)))
        self._run_unrouted(hidden_TD)
        return self.forward.output_gated(*parts)

    def _input_gated(self, gated_rows: Tensor) -> Tensor:
        see_routed = self._begin(self._hidden_TD)
        self._run_unrouted(self._hidden_TD)
        return self.forward.input_gated(gated_rows, self._scores_TE, see_routed)

    def _begin(self, hidden_TD: Tensor) -> Callable[[RoutedPairs], None]:
        """Count the tokens of a micro-batch and show their hidden states. Returns the function to call with their routed
        pairs."""
        num_seen, num_tokens = self.num_tokens, len(hidden_TD)
        self.num_tokens += num_tokens

        def unrouted() -> list[Tensor]:
            return [chosen.to(hidden_TD.device) for _, chosen in self.cells.unrouted(num_seen, num_tokens)]

        view = InputView(hidden_TD, self.forward, unrouted, self.even, num_seen)
        for collector in self.collectors:
            collector.observe_input(self.sums[collector.name], view)

        def see_routed(pairs: RoutedPairs) -> None:
            view = RoutedView(pairs, self.cells.num_cells, lambda: self.cells.of_tokens(num_seen, num_tokens))
            for collector in self.collectors:
                collector.observe_routed(self.sums[collector.name], view)

        return see_routed

    def _run_unrouted(self, hidden_TD: Tensor) -> None:
        """Run every expert on the selected tokens of each cell, routed to it or not."""
        num_seen = self.num_tokens - len(hidden_TD)
        for cell, chosen in self.cells.unrouted(num_seen, len(hidden_TD)):
            self.num_unrouted_C[cell] += len(chosen)
            some_TD = hidden_TD if self.cells.is_whole else hidden_TD[chosen.to(hidden_TD.device)]
            for activations in self.forward.unrouted(some_TD):
                self._see_unrouted(UnroutedView(activations, cell))

    def _see_sampled(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> None:
        """Run every expert on the sampled tokens, a block at a time, for the collectors that keep them."""
        collectors = [collector for collector in self.collectors if collector.keeps_tokens]
        first, places = self.sample.within(self.num_tokens - len(hidden_TD), len(hidden_TD))
        if not collectors or not len(places):
            return
        num_experts = self.weights.num_experts
        places_N = torch.from_numpy(places).to(hidden_TD.device)
        for tokens_N in places_N.split(max(1, _SAMPLED_VALUES // (num_experts * self.weights.hidden_size))):
            gates_NE = hidden_TD.new_zeros(len(tokens_N), num_experts + 1, dtype=torch.float32)  # the last: no expert
            index_Nk = top_k_index_Tk[tokens_N].clamp(max=num_experts)
            gates_NE.scatter_add_(1, index_Nk, top_k_weights_Tk[tokens_N].float())
            outputs = [self.forward.outputs_of(hidden_TD, tokens_N, expert) for expert in range(num_experts)]
            view = SampledView(first, self.choice_bias_E, self._logits_TE[tokens_N], gates_NE[:, :-1], torch.stack(outputs))
            first += len(tokens_N)
            for collector in collectors:
                collector.observe_sampled(self.sums[collector.name], view)

    def _see_unrouted(self, view: UnroutedView) -> None:
        for collector in self.collectors:
            collector.observe_unrouted(self.sums[collector.name], view)

    def result(self) -> PartialSums:
        """The sums over all tokens so far."""
        sums = {name: {key: total.cpu().numpy() for key, total in kept.items()} for name, kept in self.sums.items()}
        return PartialSums(self.layer, self.num_tokens, self.num_unrouted_C, sums)
