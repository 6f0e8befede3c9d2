"""A step of a stock router's rows towards what the layer has to give, instead of towards logits.

Dimensions: T tokens, B tokens of a block, R those that get to a slot, D hidden size, S slots, N slots and a shared expert that
is solved, X columns that the rows multiply.
"""

import torch
from torch import Tensor

from stages.recombine.calls import JOINT_COLUMNS
from stages.recombine.factor import factor_of
from stages.recombine.moments import down, product
from stages.recombine.router import Router, scores_of
from stages.recombine.solve import Problem

RIDGE = 1e-2
"""Of the mean diagonal of the moments."""
_BLOCK = 2048
_EQUAL = 0.02
"""Of their mean, up to which the sums of all tokens' gates count as equal: the router then divides by their sum."""


def moved(
    score: str, problem: Problem, bias_SD: Tensor | None, router: Router, x_TD: Tensor, logit_TS: Tensor
) -> dict[str, Tensor]:
    """Parameters of the router after one Gauss-Newton step, float32, by name; none where it has too many to solve for together.

    With r_t what the start leaves of token t's target, weighted, the step is the ridge solution towards zero of
    sum_t |r_t - sum_u (d y_t / d l_tu) (x_t . step_u)|^2, y the slots' output, l their logits; which slots a token picks is
    taken to stay. Tokens that choose the ridge are left out.

    problem: whose first slots are those of the router. bias_SD: of the slots' outputs. x_TD, logit_TS: what the router is
    given, and gives.
    """
    num_slots, num_all = logit_TS.shape[1], len(problem.slots)
    columns = x_TD.shape[1] + (router.bias is not None)
    if num_slots * columns > JOINT_COLUMNS:
        return {}
    gate_TN = torch.zeros(len(x_TD), num_all, device=x_TD.device)
    for number, slot in enumerate(problem.slots):
        gate_TN[slot.tokens_R, number] = slot.gates_R
    sum_T = gate_TN[:, :num_slots].sum(1)
    is_normalised = float((sum_T - sum_T.mean()).abs().max()) <= _EQUAL * float(sum_T.mean())
    gram_SXSX = torch.zeros(num_slots, columns, num_slots, columns, dtype=torch.float64, device=x_TD.device)
    cross_SX = torch.zeros(num_slots, columns, dtype=torch.float64, device=x_TD.device)
    for tokens_B in (~problem.held_T).nonzero().flatten().split(_BLOCK):
        x_BX, gate_BN, weight_B = x_TD[tokens_B].to(problem.wide), gate_TN[tokens_B], problem.weight_T[tokens_B]
        if router.bias is not None:
            x_BX = torch.cat([x_BX, x_BX.new_ones(len(x_BX), 1)], dim=1)
        output_BND = _outputs(problem, tokens_B, gate_BN)
        left_BD = (problem.target_TD[tokens_B] - (gate_BN[:, :, None] * output_BND).sum(1)) * weight_B[:, None]
        gate_BS, output_BSD = gate_BN[:, :num_slots], output_BND[:, :num_slots]
        if bias_SD is not None:
            output_BSD = output_BSD + bias_SD.float()
        slope_BSD = slopes(score, gate_BS, logit_TS[tokens_B].float(), output_BSD, is_normalised) * weight_B[:, None, None]
        cross_SX += torch.einsum("bsd,bd->sb", slope_BSD.to(problem.wide), left_BD.to(problem.wide)) @ x_BX
        product_BSS = torch.einsum("bsd,bud->bsu", slope_BSD, slope_BSD).to(problem.wide)
        for one in range(num_slots):
            for other in range(one + 1):
                gram_SXSX[one, :, other] += product(x_BX.T, x_BX * product_BSS[:, one, other, None])
    for one in range(num_slots):
        for other in range(one):
            gram_SXSX[other, :, one] = gram_SXSX[one, :, other].T
    gram = gram_SXSX.reshape(num_slots * columns, -1)
    if not gram.any():
        return {}
    remedy = "calibrate with more tokens, or set export.router to frequency"
    step_SX = factor_of(gram, RIDGE, f"{problem.place}, router", remedy).solve(cross_SX.reshape(-1, 1))
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


def _outputs(problem: Problem, tokens_B: Tensor, gate_BN: Tensor) -> Tensor:
    """What the start makes of the tokens that get to each slot, without a bias, float32 [B, N, D]; zeros elsewhere."""
    found = []
    for number in range(gate_BN.shape[1]):
        is_used_B = gate_BN[:, number] != 0
        some_RD = down(problem.activations(number, tokens_B[is_used_B]), problem.start[number], problem.wide).float()
        found.append(some_RD.new_zeros(len(tokens_B), some_RD.shape[1]).index_copy_(0, is_used_B.nonzero().flatten(), some_RD))
    return torch.stack(found, dim=1)
