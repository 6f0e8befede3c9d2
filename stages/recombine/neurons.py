"""Which neurons a slot keeps, of all that its members have: those whose loss a new W_down makes good least.

Dimensions: R tokens that are routed to a slot, D hidden size, F neurons of an expert, K neurons that a slot keeps, N neurons of
all members, S slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.contracts.layer_plan import Member, Slot
from stages.recombine.calls import num_candidates
from stages.recombine.factor import factor_of
from stages.recombine.solve import Moments, Problem

RIDGE = 1e-2
"""Of the mean diagonal of the moments, while neurons are eliminated."""
SHARE = 0.15
"""Of the neurons that are left, so many go at a time."""
_REMEDY = "neurons are chosen at this fixed ridge: calibrate with more tokens, or set refit.neurons to keep"

_EVERY = 8
"""One token of so many tells which neurons are important enough to be candidates."""

Activations = Callable[[int, Tensor], Tensor]
"""Of an expert of the source on some tokens, [R, F]."""
Norms = Callable[[int], Tensor]
"""Squared norms of the columns of W_down of an expert of the source, [F]."""


@dataclass(frozen=True)
class Chosen:
    """What a slot keeps. kept_K: neurons, ascending, numbered over all its members where they are joined, else in each of them
    alike; None for the slot as it is. weight_DK: W_down of these, float32."""

    kept_K: Tensor | None
    is_joined: bool
    weight_DK: Tensor


def chosen(
    slot: Slot, problem: Problem, number: int, left_TD: Tensor, activations: Activations, norms: Norms, num_kept: int
) -> Chosen:
    """The num_kept whole neurons of a slot's members that are missed most, given what the other slots give.

    A single member that keeps all its neurons stays as it is. Of many neurons (`num_candidates`) only the most important are
    candidates, by the sum of (gate a_n)^2 times the squared norm of column n of the source's W_down, over some tokens.

    problem: of the plan as it is, from W_down [D, F] that solves it. left_TD: what all slots with these leave of the weighted
    target. Slots do not depend on each other, so each may be chosen elsewhere.
    """
    tokens, weight_DF = problem.slots[number], problem.start[number]
    size = weight_DF.shape[1]
    if len(slot.members) == 1 and num_kept == size:
        return Chosen(None, False, weight_DF)
    seen, _ = tokens.split(problem.held_T)
    if not len(seen.tokens_R):  # no token says which neurons matter: the average stays, or its largest neurons
        if num_kept == size:
            return Chosen(None, False, weight_DF)
        kept_K = torch.argsort(-weight_DF.square().sum(0), stable=True)[:num_kept].sort().values
        return Chosen(kept_K, False, weight_DF[:, kept_K])
    experts = [member.expert for member in slot.members]

    def columns(tokens_R: Tensor, gates_R: Tensor) -> Tensor:
        a_RN = torch.cat([activations(expert, tokens_R) for expert in experts], dim=1)
        return problem.scaled(a_RN, tokens_R, gates_R)

    candidates_N = torch.arange(len(experts) * size, device=left_TD.device)
    num = num_candidates(len(candidates_N), num_kept)
    if num < len(candidates_N):
        energy_N = torch.zeros(len(candidates_N), dtype=torch.float64, device=left_TD.device)
        for tokens_R, gates_R in seen.every(_EVERY).blocks():
            energy_N += columns(tokens_R, gates_R).square().sum(0)
        energy_N *= torch.cat([norms(expert) for expert in experts])
        candidates_N = torch.argsort(-energy_N, stable=True)[:num].sort().values
    moments = Moments.zeros(num, left_TD.shape[1], left_TD.device)
    for tokens_R, gates_R in seen.blocks():
        own_RD = problem.columns(number, tokens_R, gates_R) @ weight_DF.T.to(problem.wide)
        moments = moments.with_rows(columns(tokens_R, gates_R)[:, candidates_N], left_TD[tokens_R] + own_RD)
    kept_K, weight_DK = eliminate(moments.whole(), num_kept, f"{problem.place}, slot {number}", problem.wide)
    return Chosen(candidates_N[kept_K], True, weight_DK.float())


def chosen_slot(slot: Slot, found: Chosen, size: int) -> Slot:
    """The slot made of what was chosen. size: neurons of a member. A member of which none is kept still shares its bias."""
    if found.kept_K is None:
        return slot
    kept = found.kept_K.tolist()
    if not found.is_joined:
        return replace(slot, members=tuple(replace(member, neurons=tuple(kept)) for member in slot.members))
    by_member = [
        tuple(neuron - position * size for neuron in kept if position * size <= neuron < (position + 1) * size)
        for position in range(len(slot.members))
    ]
    members = tuple(
        Member(member.expert, member.weight, neurons) for member, neurons in zip(slot.members, by_member, strict=True)
    )
    return replace(slot, members=members, is_joined=True)


def eliminate(
    moments: Moments, num_kept: int, place: str, dtype: torch.dtype = torch.float64, share: float | None = None
) -> tuple[Tensor, Tensor]:
    """Indices [num_kept] of the neurons that stay, ascending, and their W_down [D, num_kept].

    Optimal brain surgeon on groups of one neuron (Hassibi and Stork, 1993): with the ridge solution b_n and the inverse P of
    the moments, the loss without neuron n is |b_n|^2 / P_nn. The least go, a share (SHARE by default) at a time. What is left
    is solved anew from the inverse that there is: without neurons G, P becomes P_KK - P_KG P_GG^-1 P_GK, and b becomes
    b_K - P_KG P_GG^-1 b_G.

    dtype: of P and b once the moments, float64, are factored and solved; they decide, and are where the refit starts.
    """
    factor = factor_of(moments.gram_NN, RIDGE, place, _REMEDY)
    weight_ND, inverse_NN = factor.solve(moments.cross_ND).to(dtype), factor.inverse(dtype)
    kept = torch.arange(len(weight_ND), device=weight_ND.device)
    while len(kept) > num_kept:
        loss_N = weight_ND.square().sum(1) / inverse_NN.diagonal()
        num_gone = min(max(1, int((SHARE if share is None else share) * len(kept))), len(kept) - num_kept)
        order = torch.argsort(loss_N, stable=True)
        gone, stays = order[:num_gone], order[num_gone:].sort().values
        rows_GN = inverse_NN.index_select(0, gone)
        lower_GG = torch.linalg.cholesky(rows_GN.index_select(1, gone))
        part_GK = torch.linalg.solve_triangular(lower_GG, rows_GN.index_select(1, stays), upper=False)
        part_GD = torch.linalg.solve_triangular(lower_GG, weight_ND.index_select(0, gone), upper=False)
        weight_ND = weight_ND.index_select(0, stays).addmm_(part_GK.T, part_GD, alpha=-1)
        kept = kept[stays]
        if len(kept) > num_kept:
            inverse_NN = inverse_NN.index_select(0, stays).index_select(1, stays).addmm_(part_GK.T, part_GK, alpha=-1)
    return kept, weight_ND.T.contiguous()
