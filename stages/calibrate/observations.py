"""Data that the watcher of a MoE layer passes to collectors for each micro-batch.

Dimensions: T tokens, D hidden size, F intermediate size, E experts, S experts of a stack, R routed pairs of a token and an
expert, C cells, N sampled tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stages.calibrate.even_tokens import EvenTokens
from stages.model.experts_forward import Activations, ExpertsForward, RoutedPairs


@dataclass(frozen=True)
class RouterView:
    """The router's logits, float32 [T, E], and its scores (softmax or sigmoid of the logits)."""

    logits_TE: Tensor
    scores_TE: Tensor


@dataclass(frozen=True)
class InputView:
    """The input of the layer's experts, hidden_TD, and their forward, which a collector may call on tokens of its choice.

    unrouted: returns the indices of the tokens that un-routed sums cover, by cell. even: the evenly spaced tokens of the token
    shard, of which num_seen tokens came before these.
    """

    hidden_TD: Tensor
    forward: ExpertsForward
    unrouted: Callable[[], Sequence[Tensor]]
    even: EvenTokens | None
    num_seen: int

    def evenly_spaced(self) -> tuple[int, Tensor]:
        """Indices of the evenly spaced tokens among these, and the number of the token shard's before them."""
        assert self.even is not None, "the watcher was not told where its tokens are in the calibration set"
        row, tokens = self.even.chosen(self.num_seen, len(self.hidden_TD))
        return row, torch.tensor(tokens, dtype=torch.int64, device=self.hidden_TD.device)


@dataclass(frozen=True)
class SampledView:
    """A block of sampled tokens.

    first: how many of the token shard's sampled tokens come before. choice_bias_E: added to scores where the router picks
    experts; zeros for a router without. gates_NE: the weights that the model gave the experts, 0 where it did not pick them.
    output_END: outputs of all experts, picked or not, not gated.
    """

    first: int
    choice_bias_E: Tensor
    logits_NE: Tensor
    gates_NE: Tensor
    output_END: Tensor


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
