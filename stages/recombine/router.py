"""Rows of a stock router with one row a slot, fitted so that a slot is chosen as its members were.

Dimensions: T tokens, D hidden size, E experts of the source, S slots.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stages.recombine.factor import factor_of

RIDGE = 1e-3
"""Of the mean diagonal of the moments."""


def softmax_target(logits_TE: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Logits [T, S] that give a slot the sum of its members' probabilities: log sum_e exp(l_e), less the mean over slots.

    A softmax does not see what all logits of a token have in common, so no row has to follow it.
    """
    summed_TS = torch.stack([logits_TE[:, list(group)].logsumexp(1) for group in groups], dim=1)
    return summed_TS - summed_TS.mean(1, keepdim=True)


def sigmoid_target(logits_TE: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Logits [T, S] that give a slot the probability that any of its members fires: 1 - prod_e (1 - sigmoid(l_e)).

    The noisy-or of independent causes (Pearl, 1988). Its logit is log(exp(sum_e softplus(l_e)) - 1): l_e for a single member,
    and for small scores the logarithm of their sum, as with a softmax.
    """
    total_TS = torch.stack([functional.softplus(logits_TE[:, list(group)]).sum(1) for group in groups], dim=1)
    return total_TS + torch.log(-torch.expm1(-total_TS))


TARGETS: Mapping[str, Callable[[Tensor, Sequence[Sequence[int]]], Tensor]] = {
    "softmax": softmax_target,
    "sigmoid": sigmoid_target,
}
"""By how the family's router turns logits into scores. A correction bias, which only steers the choice, is not fitted."""


def scores_of(score: str, logits_TE: Tensor) -> Tensor:
    """Scores [T, E] of a router's logits, before any choice."""
    return logits_TE.softmax(1) if score == "softmax" else torch.sigmoid(logits_TE)


@dataclass(frozen=True)
class Router:
    """The linear part of a router: weight [., D], and bias [.] or None. names: of the parameters, in the same order."""

    names: tuple[str, ...]
    weight: Tensor
    bias: Tensor | None

    def logits(self, x_TD: Tensor) -> Tensor:
        """Float32, [T, .]."""
        return functional.linear(x_TD.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def gives(self, x_TD: Tensor, logits: Tensor) -> bool:
        """Whether it is all that a router does to x before it scores, given the logits that the model itself gets."""
        due = self.logits(x_TD)
        return logits.shape == due.shape and float((logits.float() - due).norm()) < 0.02 * float(due.norm())


def fitted(score: str, source: Router, start: Router, x_TD: Tensor, groups: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Parameters of a router with one row a slot, float32, by name, fitted to the source's by ridge regression on x.

    The pull is towards the start, RIDGE of the mean diagonal of X^T X. groups: experts of the source by slot.
    """
    target_TS = TARGETS[score](source.logits(x_TD).double(), groups)
    columns_TN, start_SN = x_TD.double(), start.weight.double()
    if start.bias is not None:
        columns_TN = torch.cat([columns_TN, columns_TN.new_ones(len(columns_TN), 1)], dim=1)
        start_SN = torch.cat([start_SN, start.bias.double()[:, None]], dim=1)
    if score == "softmax":
        start_SN = start_SN - start_SN.mean(0)
    rows_SN = (start_SN + ridge_rows(columns_TN)(target_TS - columns_TN @ start_SN.T).T).float()
    parts = (rows_SN,) if start.bias is None else (rows_SN[:, :-1], rows_SN[:, -1])
    return {name: part.contiguous() for name, part in zip(start.names, parts, strict=True)}


def ridge_rows(columns_TN: Tensor) -> Callable[[Tensor], Tensor]:
    """Given targets [T, S] in the dtype of the columns, the weights [N, S] of the columns that fit them, float64, by ridge
    regression towards zero."""
    remedy = "calibrate with more tokens, or set export.router to frequency"
    wide_TN = columns_TN.double()
    factor = factor_of(wide_TN.T @ wide_TN, RIDGE, "router", remedy)
    return lambda target_TS: factor.solve((columns_TN.T @ target_TS).double())
