"""What a router would pick among fewer experts, and with which gates: from the logits of sampled tokens.

Dimensions: E experts, K experts that are kept, N tokens, k experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.errors import InputError

_MOST_OFF = 0.03
"""Of the gates' norm. bfloat16 gates are off by 0.002; two equal logits that are picked the other way round by more."""


@dataclass(frozen=True)
class RoutingRule:
    """How logits become gates.

    top_k: experts a token. score: "softmax" over all experts that there are, or "sigmoid". choice: what the largest of are
    picked: "logit", or with the router's bias "score + bias" or "logit + bias". is_normalised: whether the gates of a token are
    divided by their sum. scale: factor at the end.
    """

    top_k: int
    score: str
    choice: str
    is_normalised: bool
    scale: float = 1.0

    def route(self, logit_NE: Array, bias_E: Array, kept: Sequence[int]) -> tuple[Array, Array]:
        """Experts [N, k] that are picked among the kept ones, and their gates [N, k]. The router has no rows for the others."""
        experts = np.asarray(kept)
        logit_NK = logit_NE[:, experts]
        if self.score == "softmax":
            score_NK = np.exp(logit_NK - logit_NK.max(1, keepdims=True))
            score_NK /= score_NK.sum(1, keepdims=True)
        else:
            score_NK = 1 / (1 + np.exp(-logit_NK))
        choice_NK = score_NK if self.choice == "score + bias" else logit_NK
        if self.choice != "logit":
            choice_NK = choice_NK + bias_E[experts]
        picked_Nk = np.argsort(-choice_NK, axis=1, kind="stable")[:, : self.top_k]
        gate_Nk = np.take_along_axis(score_NK, picked_Nk, 1)
        if self.is_normalised:
            gate_Nk = gate_Nk / gate_Nk.sum(1, keepdims=True)
        return experts[picked_Nk], self.scale * gate_Nk


def rule_of(logit_NE: Array, bias_E: Array, gate_NE: Array, place: str) -> RoutingRule:
    """The rule that gives the model's own gates for these logits, with all experts: found by trial, so that none is assumed.

    bias_E: the router's bias; zeros for one without. Raises InputError where no rule does: the router looks at something else.
    """
    num_experts, top_k = gate_NE.shape[1], int((gate_NE != 0).sum(1).max())
    choices = ("score + bias", "logit + bias") if bias_E.any() else ("logit",)
    for score, choice, is_normalised in product(("softmax", "sigmoid"), choices, (True, False)):
        rule = RoutingRule(top_k, score, choice, is_normalised)
        picked_Nk, found_Nk = rule.route(logit_NE, bias_E, range(num_experts))
        found_NE = np.zeros_like(gate_NE)
        np.put_along_axis(found_NE, picked_Nk, found_Nk, 1)
        scale = float((found_NE * gate_NE).sum() / max(np.square(found_NE).sum(), np.finfo(np.float64).tiny))
        if np.linalg.norm(gate_NE - scale * found_NE) <= _MOST_OFF * np.linalg.norm(gate_NE):
            return replace(rule, scale=scale)
    raise InputError(
        f"{place}: its gates are no softmax or sigmoid of its {top_k} largest router logits, so what the router would pick "
        "among fewer experts is not known; choose another method, such as reap"
    )
