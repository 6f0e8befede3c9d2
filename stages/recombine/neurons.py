"""Which neurons a slot keeps, of all that its members have: those whose loss a new W_down makes good least.

Dimensions: R tokens that are routed to a slot, D hidden size, E experts of the source, F neurons of one, K neurons that a slot
keeps, N neurons of all members.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.contracts.layer_plan import Member, Slot
from stages.recombine.calls import SHARE, num_candidates
from stages.recombine.factor import factor_of
from stages.recombine.moments import Moments
from stages.recombine.solve import Problem, SlotTokens

RIDGE = 1e-2
"""Of the mean diagonal of the moments, while neurons are eliminated."""
_REMEDY = "neurons are chosen at this fixed ridge: calibrate with more tokens, or set refit.neurons to keep"

_EVERY = 8
"""One token of so many tells which neurons are important enough to be candidates."""


@dataclass(frozen=True)
class SourceExperts:
    """Experts of the source on what the student gives them. activations: of an expert on some tokens, [R, F]. outputs: what its
    W_down makes of these, without a bias, [R, D]. gates: of all experts on some tokens by the source's router, [R, E].
    down_square_norms: of the columns of its W_down, [F]."""

    activations: Callable[[int, Tensor], Tensor]
    outputs: Callable[[int, Tensor], Tensor]
    gates: Callable[[Tensor], Tensor]
    down_square_norms: Callable[[int], Tensor]


@dataclass(frozen=True)
class Chosen:
    """What a slot keeps. kept_K: neurons, ascending, numbered over all its members where they are joined, else in each of them
    alike; None for the slot as it is. weight_DK: W_down of these, float32."""

    kept_K: Tensor | None
    is_joined: bool
    weight_DK: Tensor


def chosen(slot: Slot, problem: Problem, number: int, source: SourceExperts, num_kept: int, choice_columns: int) -> Chosen:
    """The num_kept whole neurons of a slot's members with which, W_down solved anew, the slot comes closest to what the members
    give: sum_e q_e f_e(x), with the source's gates q, on the tokens that are routed to the slot.

    A single member that keeps all its neurons stays as it is. Only the most important neurons are candidates
    (`num_candidates`), by the sum of (gate a_n)^2 times the squared norm of column n of the source's W_down, over some tokens.

    problem: of the plan as it is. choice_columns: as in `Bounds`. Slots do not depend on each other, so each may be chosen
    elsewhere.
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
    candidates_N = _candidates(experts, problem, seen, source, num_candidates(len(experts) * size, num_kept, choice_columns))
    moments = Moments.zeros(len(candidates_N), len(weight_DF), weight_DF.device)
    for tokens_R, gates_R in seen.blocks():
        gate_RE, parts = source.gates(tokens_R), [source.activations(expert, tokens_R) for expert in experts]
        target_RD = sum(
            problem.scaled(source.outputs(expert, a_RF), tokens_R, gate_RE[:, expert])
            for expert, a_RF in zip(experts, parts, strict=True)
        )
        assert isinstance(target_RD, Tensor)
        columns_RN = problem.scaled(torch.cat(parts, dim=1)[:, candidates_N], tokens_R, gates_R)
        moments = moments.with_rows(columns_RN, target_RD)
    kept_K, weight_DK = eliminate(moments.whole(), num_kept, f"{problem.place}, slot {number}", problem.wide)
    return Chosen(candidates_N[kept_K], True, weight_DK.float())


def _candidates(experts: Sequence[int], problem: Problem, seen: SlotTokens, source: SourceExperts, num: int) -> Tensor:
    """The num most important neurons of some experts, ascending, numbered over all of them."""
    norm_N = torch.cat([source.down_square_norms(expert) for expert in experts])
    if num == len(norm_N):
        return torch.arange(num, device=norm_N.device)
    energy_N = torch.zeros_like(norm_N)
    for tokens_R, gates_R in seen.every(_EVERY).blocks():
        a_RN = torch.cat([source.activations(expert, tokens_R) for expert in experts], dim=1)
        energy_N += problem.scaled(a_RN, tokens_R, gates_R).square().sum(0)
    return torch.argsort(-energy_N * norm_N, stable=True)[:num].sort().values


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

    dtype: of P and b once the moments, float64, are factored; they decide, and are where the refit starts.
    """
    lower_NN = factor_of(moments.gram_NN, RIDGE, place, _REMEDY).lower_NN.to(dtype)
    weight_ND, inverse_NN = torch.cholesky_solve(moments.cross_ND.to(dtype), lower_NN), torch.cholesky_inverse(lower_NN)
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
