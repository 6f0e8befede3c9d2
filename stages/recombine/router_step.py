"""A step of a stock router's rows towards what the layer has to give, instead of towards logits.

Dimensions: T tokens, B tokens of a block, D hidden size, S slots, X columns that the rows multiply, N = S X.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stages.recombine.calls import JOINT_COLUMNS
from stages.recombine.factor import factor_of
from stages.recombine.router import Router, scores_of
from stages.recombine.solve import Problem

RIDGE = 1e-2
"""Of the mean diagonal of the moments."""
_BLOCK = 2048
_EQUAL = 0.02
"""Of their mean, up to which the sums of all tokens' gates count as equal: the router then divides by their sum."""


def moved(
    score: str,
    problem: Problem,
    left_TD: Tensor,
    outputs: Callable[[int, Tensor], Tensor],
    router: Router,
    x_TD: Tensor,
    logit_TS: Tensor,
) -> dict[str, Tensor]:
    """Parameters of the router after one Gauss-Newton step, float32, by name; none where it has too many to solve for together.

    With r_t what is left of token t's target, weighted, the step is the ridge solution towards zero of
    sum_t |r_t - sum_u (d y_t / d l_tu) (x_t . step_u)|^2, y the slots' output, l their logits; which slots a token picks is
    taken to stay. Tokens that choose the ridge are left out.

    problem: whose first slots are those of the router. left_TD: what is left of its weighted target. outputs: of a slot on some
    tokens [R, D], with its bias. x_TD, logit_TS: what the router is given, and gives.
    """
    num_slots = logit_TS.shape[1]
    if num_slots * (x_TD.shape[1] + (router.bias is not None)) > JOINT_COLUMNS:
        return {}
    gate_TS = torch.zeros(len(x_TD), num_slots, device=x_TD.device)
    for number in range(num_slots):
        gate_TS[problem.slots[number].tokens_R, number] = problem.slots[number].gates_R
    sum_T = gate_TS.sum(1)
    is_normalised = float((sum_T - sum_T.mean()).abs().max()) <= _EQUAL * float(sum_T.mean())
    seen_T = ~problem.held_T
    columns = x_TD.shape[1] + (router.bias is not None)
    gram_SXSX = torch.zeros(num_slots, columns, num_slots, columns, dtype=torch.float64, device=x_TD.device)
    cross_SX = torch.zeros(num_slots, columns, dtype=torch.float64, device=x_TD.device)
    for tokens_B in seen_T.nonzero().flatten().split(_BLOCK):
        x_BX = x_TD[tokens_B].to(problem.wide)
        if router.bias is not None:
            x_BX = torch.cat([x_BX, x_BX.new_ones(len(x_BX), 1)], dim=1)
        gate_BS = gate_TS[tokens_B]
        slope_BSD = slopes(score, gate_BS, logit_TS[tokens_B].float(), _outputs(outputs, tokens_B, gate_BS), is_normalised)
        slope_BSD = slope_BSD * problem.weight_T[tokens_B, None, None]
        cross_SX += torch.einsum("bsd,bd->sb", slope_BSD.to(problem.wide), left_TD[tokens_B]) @ x_BX
        product_BSS = torch.einsum("bsd,bud->bsu", slope_BSD, slope_BSD).to(problem.wide)
        for one in range(num_slots):
            for other in range(one + 1):
                gram_SXSX[one, :, other] += x_BX.T @ (x_BX * product_BSS[:, one, other, None])
    for one in range(num_slots):
        for other in range(one):
            gram_SXSX[other, :, one] = gram_SXSX[one, :, other].T
    gram_NN = gram_SXSX.reshape(num_slots * columns, -1)
    if not gram_NN.any():
        return {}
    remedy = "calibrate with more tokens, or set export.router to frequency"
    step_SX = factor_of(gram_NN, RIDGE, f"{problem.place}, router", remedy).solve(cross_SX.reshape(-1, 1))
    step_SX = step_SX.reshape(num_slots, columns)
    if router.bias is None:
        return {router.names[0]: (router.weight.double() + step_SX).float()}
    weight, bias = router.names
    return {
        weight: (router.weight.double() + step_SX[:, :-1]).float(), bias: (router.bias.double() + step_SX[:, -1]).float(),
    }  # fmt: skip


def slopes(score: str, gate_BS: Tensor, logit_BS: Tensor, output_BSD: Tensor, is_normalised: bool) -> Tensor:
    """What the slots' output sum_s g_s f_s changes by with each logit, [B, S, D], where picks stay.

    g_s is p_s, the slot's score, times a number, or that over the sum of all picked ones. y = sum_s g_s f_s, c = sum_s g_s:
    softmax g_u f_u - p_u y, or g_u (f_u - y / c); sigmoid (1 - p_u) g_u f_u, or (1 - p_u) g_u (f_u - y / c).
    """
    given_BSD = gate_BS[:, :, None] * output_BSD
    score_BS = scores_of(score, logit_BS)
    total_B1D = given_BSD.sum(1, keepdim=True)
    if is_normalised:
        share_BS = gate_BS / gate_BS.sum(1, keepdim=True).clamp(min=1e-30)
        given_BSD = given_BSD - share_BS[:, :, None] * total_B1D
    elif score == "softmax":
        given_BSD = given_BSD - score_BS[:, :, None] * total_B1D
    return given_BSD if score == "softmax" else (1 - score_BS[:, :, None]) * given_BSD


def _outputs(outputs: Callable[[int, Tensor], Tensor], tokens_B: Tensor, gate_BS: Tensor) -> Tensor:
    """Outputs [B, S, D] of the slots on the tokens that pick them; zeros elsewhere."""
    found = []
    for number in range(gate_BS.shape[1]):
        is_used_B = gate_BS[:, number] != 0
        some_RD = outputs(number, tokens_B[is_used_B]).float()
        found.append(some_RD.new_zeros(len(tokens_B), some_RD.shape[1]).index_copy_(0, is_used_B.nonzero().flatten(), some_RD))
    return torch.stack(found, dim=1)
