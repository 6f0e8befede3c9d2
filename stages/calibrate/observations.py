"""Data that the watcher of a MoE layer passes to collectors for each micro-batch.

Dimensions: T tokens, D hidden size, F intermediate size, E experts, S experts of a stack, R routed pairs of a token and an
expert, C cells, N kept tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.model.experts_forward import Activations, ExpertsForward, RoutedPairs


@dataclass(frozen=True)
class RouterView:
    """The router's logits, float32 [T, E], and its scores (softmax or sigmoid of the logits)."""

    logits_TE: Tensor
    scores_TE: Tensor


@dataclass(frozen=True)
class InputView:
    """The input of the layer's experts, hidden_TD, and their forward, which a collector may call on some of its tokens.

    unrouted: returns the indices of the tokens that un-routed sums cover, by cell.
    """

    hidden_TD: Tensor
    forward: ExpertsForward
    unrouted: Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class KeptView:
    """The tokens of a micro-batch that one collector keeps one by one; at least one.

    rows: of these among the collector's tokens of the token shard. hidden_TD, forward: as in `InputView`. tokens_N: their
    indices in hidden_TD. logits_NE: of the router. gates_NE: the weights that the model gave the experts, 0 where it did not
    pick them. choice_bias_E: added to scores where the router picks experts; zeros for a router without.
    """

    rows: slice
    hidden_TD: Tensor
    forward: ExpertsForward
    tokens_N: Tensor
    logits_NE: Tensor
    gates_NE: Tensor
    choice_bias_E: Tensor


@dataclass(frozen=True)
class UnroutedView:
    """Activations of a stack of experts on one cell's tokens (under sampling only the sampled ones), routed to them or not."""

    activations: Activations
    cell: int

    def add_to(self, total_ECF: Tensor) -> None:
        """Add the sum over tokens to float64 totals by expert and cell."""
        self.activations.add_to(total_ECF[self.activations.first : self.activations.stop, self.cell])


@dataclass(frozen=True)
class RoutedView:
    """The routed pairs of a stack of experts on all tokens. num_cells: number of different values in `cells`."""

    pairs: RoutedPairs
    num_cells: int
    cells: Callable[[], Tensor]
    """Returns the cell of each token of the micro-batch, [T]. A function, so that the cells are computed only on demand."""

    @cached_property
    def cell_R(self) -> Tensor:
        """The cell of each pair."""
        return self.cells().to(self.pairs.tokens_R.device)[self.pairs.tokens_R]

    def sum_by_cell(self, values_R: Tensor) -> Tensor:
        """Sum of one value per pair, for each expert and cell, float64 [S, C]."""
        if self.num_cells == 1:
            return self.pairs.sum_by_expert(values_R)[:, None]
        zero = torch.zeros((), dtype=values_R.dtype, device=values_R.device)
        parts = [torch.where(self.cell_R == cell, values_R, zero) for cell in range(self.num_cells)]
        return torch.stack([self.pairs.sum_by_expert(part_R) for part_R in parts], dim=1)
