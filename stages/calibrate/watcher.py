"""Watches one MoE layer while it runs and passes its values to collectors.

Dimensions: T tokens, D hidden size, E experts, k experts a token, C cells, N kept tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from stages.calibrate.cells import Cells
from stages.calibrate.collectors.base import Collector
from stages.calibrate.observations import InputView, KeptView, RoutedView, RouterView, UnroutedView
from stages.calibrate.sums import PartialSums
from stages.calibrate.token_sample import ShardPlace, TokenSample
from stages.model.expert_weights import ExpertWeights
from stages.model.experts_forward import ExpertsForward, RoutedPairs
from stages.model.families import Family
from stages.model.stream import replaced_forward

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
}


class Watcher:
    """Replaces the experts' forward inside its context. The layer's output stays the same, up to rounding.

    router: the module that returns the router logits [T, E]. family: states how logits become scores, and whether gates
    multiply inputs or outputs. place: of the token shard; needed by collectors that keep tokens one by one. choice_bias_E: what
    the router adds to scores where it picks experts; None for nothing. is_token_T: False for padding of the token shard; None
    if there is none. The experts run on tokens alone, so no collector sees padding; its place in their output is zero.
    """

    def __init__(
        self,
        layer: int,
        weights: ExpertWeights,
        router: nn.Module,
        family: Family,
        cells: Cells,
        collectors: Sequence[Collector],
        place: ShardPlace | None = None,
        choice_bias_E: Tensor | None = None,
        is_token_T: Tensor | None = None,
    ) -> None:
        self.layer, self.weights, self.router = layer, weights, router
        self.cells, self.collectors = cells, collectors
        self.samples = {collector.name: _sample(collector, weights, place) for collector in collectors}
        self.choice_bias_E = torch.zeros(weights.num_experts) if choice_bias_E is None else choice_bias_E
        self.forward = ExpertsForward(weights, pads_unrouted=is_token_T is not None)
        self._score, self._gates_input = SCORES[family.score], family.gates_input
        sizes = {"C": cells.num_cells, "D": weights.hidden_size, "E": weights.num_experts, "F": weights.intermediate}
        self.sums: dict[str, dict[str, Tensor]] = {
            collector.name: {
                kept.name: torch.zeros(
                    kept.sizes({**sizes, "N": len(self.samples[collector.name].places_N)}),
                    dtype=torch.float64,
                    device=weights.device,
                )
                for kept in collector.sums
            }
            for collector in collectors
        }
        self._is_token_T, self._num_places = is_token_T, 0
        self._tokens_R: Tensor | None = None
        self.num_tokens = 0
        self.num_unrouted_C = np.zeros(cells.num_cells, dtype=np.int64)
        self._replaced = ExitStack()

    def __enter__(self) -> Self:
        self._replaced.enter_context(replaced_forward(self.weights.experts, self._run))
        self._replaced.callback(self.router.register_forward_hook(self._watch_router).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._replaced.close()

    def _watch_router(self, _module: nn.Module, args: Any, output: Any) -> None:
        if self._gates_input:
            scores_TE, logits = output
        else:
            logits = output[0] if isinstance(output, tuple) else output
        logits_TE = logits.reshape(-1, self.weights.num_experts).float()
        self._tokens_R = self._next_tokens(len(logits_TE), logits_TE.device)
        logits_TE = self._of_tokens(logits_TE)
        if self._gates_input:
            self._hidden_TD: Tensor = self._of_tokens(args[0])
            self._scores_TE: Tensor = self._of_tokens(scores_TE)
        self._logits_TE = logits_TE
        view = RouterView(logits_TE, self._score(logits_TE))
        for collector in self.collectors:
            collector.observe_router(self.sums[collector.name], view)

    def _next_tokens(self, num_places: int, device: torch.device) -> Tensor | None:
        """Which of the next places of the token shard hold tokens; None for all."""
        first, self._num_places = self._num_places, self._num_places + num_places
        if self._is_token_T is None:
            return None
        return self._is_token_T[first : self._num_places].nonzero().flatten().to(device)

    def _of_tokens(self, values: Tensor) -> Tensor:
        """Rows of the micro-batch without those of padding."""
        return values if self._tokens_R is None else values[self._tokens_R]

    def _run(self, *given: Tensor) -> Tensor:
        """The experts' forward. Their rows of padding are left out, and are zeros in the result."""
        run: Callable[..., Tensor] = self._input_gated if self._gates_input else self._output_gated
        if self._tokens_R is None:
            return run(*given)
        if not self._gates_input:
            return torch.zeros_like(given[0]).index_copy(0, self._tokens_R, run(*map(self._of_tokens, given)))
        rows_ETD = given[0].view(self.weights.num_experts, -1, given[0].shape[-1])
        output_ERD = run(rows_ETD[:, self._tokens_R].flatten(0, 1)).view(len(rows_ETD), -1, rows_ETD.shape[-1])
        return torch.zeros_like(rows_ETD).index_copy(1, self._tokens_R, output_ERD).view_as(given[0])

    def _output_gated(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        see_routed = self._begin(hidden_TD)

        def gates(tokens_N: Tensor) -> Tensor:
            num_experts = self.weights.num_experts
            gates_NE = hidden_TD.new_zeros(len(tokens_N), num_experts + 1, dtype=torch.float32)  # the last: no expert
            index_Nk = top_k_index_Tk[tokens_N].clamp(max=num_experts)
            return gates_NE.scatter_add_(1, index_Nk, top_k_weights_Tk[tokens_N].float())[:, :-1]

        self._see_kept(hidden_TD, gates)
        parts = (hidden_TD, top_k_index_Tk, top_k_weights_Tk, see_routed)
        if self.cells.is_whole:
            self.num_unrouted_C[0] += len(hidden_TD)
            return self.forward.output_gated(*parts, lambda activations: self._see_unrouted(UnroutedView(activations, 0)))
        self._run_unrouted(hidden_TD)
        return self.forward.output_gated(*parts)

    def _input_gated(self, gated_rows: Tensor) -> Tensor:
        see_routed = self._begin(self._hidden_TD)
        self._see_kept(self._hidden_TD, lambda tokens_N: self._scores_TE[tokens_N].float())
        self._run_unrouted(self._hidden_TD)
        return self.forward.input_gated(gated_rows, self._scores_TE, see_routed)

    def _begin(self, hidden_TD: Tensor) -> Callable[[RoutedPairs], None]:
        """Count the tokens of a micro-batch and show their hidden states. Returns the function to call with their routed
        pairs."""
        num_seen, num_tokens = self.num_tokens, len(hidden_TD)
        self.num_tokens += num_tokens

        def unrouted() -> list[Tensor]:
            return [chosen.to(hidden_TD.device) for _, chosen in self.cells.unrouted(num_seen, num_tokens)]

        view = InputView(hidden_TD, self.forward, unrouted)
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

    def _see_kept(self, hidden_TD: Tensor, gates: Callable[[Tensor], Tensor]) -> None:
        """Show each collector the tokens that it keeps. gates: given indices [N] of tokens, their gates [N, E]."""
        for collector in self.collectors:
            first, places = self.samples[collector.name].within(self.num_tokens - len(hidden_TD), len(hidden_TD))
            if not len(places):
                continue
            tokens_N, rows = torch.from_numpy(places).to(hidden_TD.device), slice(first, first + len(places))
            view = KeptView(
                rows, hidden_TD, self.forward, tokens_N, self._logits_TE[tokens_N], gates(tokens_N), self.choice_bias_E
            )
            collector.observe_kept(self.sums[collector.name], view)

    def _see_unrouted(self, view: UnroutedView) -> None:
        for collector in self.collectors:
            collector.observe_unrouted(self.sums[collector.name], view)

    def result(self) -> PartialSums:
        """The sums over all tokens so far."""
        sums = {name: {key: total.cpu().numpy() for key, total in kept.items()} for name, kept in self.sums.items()}
        return PartialSums(self.layer, self.num_tokens, self.num_unrouted_C, sums)


def _sample(collector: Collector, weights: ExpertWeights, place: ShardPlace | None) -> TokenSample:
    """The tokens of a token shard that a collector keeps; none if it keeps sums alone."""
    kept = collector.keeps(weights.num_experts, weights.intermediate)
    if kept is None:
        return TokenSample(np.zeros(0, dtype=np.int64))
    assert place is not None, f"{collector.name} keeps tokens, but the watcher was not told where they are"
    return TokenSample.of(place, kept.most)
