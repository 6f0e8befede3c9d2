"""Which neurons a slot keeps, of all that its members have: those whose loss a new W_down makes good least.

Dimensions: R tokens that are routed to a slot, D hidden size, F neurons of an expert, K neurons that a slot keeps, N neurons of
all members, S slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.contracts.layer_plan import LayerPlan, Member, Slot
from stages.recombine.solve import Moments, Problem, factor_of, slot_moments

RIDGE = 1e-2
"""Of the mean diagonal of the moments, while neurons are eliminated."""
SHARE = 0.15
"""Of the neurons that are left, so many go at a time."""
_REMEDY = "neurons are chosen at this fixed ridge: calibrate with more tokens, or set refit.neurons to keep"

Activations = Callable[[int, Tensor], Tensor]
"""Of an expert of the source on some tokens, [R, F]."""


def chosen_plan(
    plan: LayerPlan, problem: Problem, solved: Sequence[Tensor], activations: Activations, num_kept: int
) -> tuple[LayerPlan, list[Tensor]]:
    """A plan whose slots hold num_kept whole neurons of their members; and W_down [D, K] of each.

    Slot after slot: what the others leave of the target is what a slot's neurons have to give. A single member that keeps all
    its neurons stays as it is. problem, solved: of the plan as it is, and W_down [D, F] that solves it.
    """
    left_TD = problem.target_TD.double() * problem.weight_T.double()[:, None]
    weights = [weight.double() for weight in solved]
    for number, tokens in enumerate(problem.slots):
        problem.add(left_TD, number, tokens, -weights[number])
    slots = list(plan.slots)
    for number, slot in enumerate(plan.slots):
        tokens, size = problem.slots[number], weights[number].shape[1]
        seen, _ = tokens.split(problem.held_T)
        if len(slot.members) == 1 and num_kept == size:
            continue
        problem.add(left_TD, number, tokens, weights[number])
        if not len(seen.tokens_R):  # no token says which neurons matter: the average stays, or its largest neurons
            slots[number], kept = _largest(slot, weights[number], num_kept)
            stays = torch.zeros_like(weights[number]).index_copy(1, kept, weights[number][:, kept])
            problem.add(left_TD, number, tokens, -stays)
            weights[number] = weights[number][:, kept]
            continue
        experts = [member.expert for member in slot.members]
        columns = _columns(problem, experts, activations)
        moments = slot_moments(columns, len(experts) * size, seen, left_TD)
        kept, weights[number] = eliminate(moments, num_kept, f"{problem.place}, slot {number}")
        slots[number] = _joined(slot, kept.tolist(), size)
        for tokens_R, gates_R in tokens.blocks():
            left_TD.index_add_(0, tokens_R, -(columns(tokens_R, gates_R)[:, kept] @ weights[number].T))
    return replace(plan, slots=tuple(slots)), [weight.float() for weight in weights]


def _largest(slot: Slot, weight_DF: Tensor, num_kept: int) -> tuple[Slot, Tensor]:
    """The slot with the neurons that have the largest columns of W_down, still averaged; and their indices [K], ascending."""
    if num_kept == weight_DF.shape[1]:
        return slot, torch.arange(num_kept, device=weight_DF.device)
    kept = torch.argsort(-weight_DF.square().sum(0), stable=True)[:num_kept].sort().values
    neurons = tuple(kept.tolist())
    return replace(slot, members=tuple(replace(member, neurons=neurons) for member in slot.members)), kept


def _joined(slot: Slot, kept: Sequence[int], size: int) -> Slot:
    """The slot made of these neurons, numbered over all members. A member of which none is kept still shares its bias."""
    by_member = [
        tuple(neuron - position * size for neuron in kept if position * size <= neuron < (position + 1) * size)
        for position in range(len(slot.members))
    ]
    members = tuple(
        Member(member.expert, member.weight, neurons) for member, neurons in zip(slot.members, by_member, strict=True)
    )
    return replace(slot, members=members, is_joined=True)


def eliminate(moments: Moments, num_kept: int, place: str) -> tuple[Tensor, Tensor]:
    """Indices [num_kept] of the neurons that stay, ascending, and their W_down [D, num_kept].

    Optimal brain surgeon on groups of one neuron (Hassibi and Stork, 1993): with the ridge solution b_n and the inverse P of
    the moments, the loss without neuron n is |b_n|^2 / P_nn. The least go, SHARE at a time.
    """
    kept = torch.arange(len(moments.gram_NN), device=moments.gram_NN.device)
    while True:
        some = Moments(moments.gram_NN[kept][:, kept], moments.cross_ND[kept], moments.total)
        factor = factor_of(some.gram_NN, RIDGE, place, _REMEDY)
        weight_ND = torch.cholesky_solve(some.cross_ND, factor)
        if len(kept) == num_kept:
            return kept, weight_ND.T.contiguous()
        loss_N = weight_ND.square().sum(1) / torch.cholesky_inverse(factor).diagonal()
        num_gone = min(max(1, int(SHARE * len(kept))), len(kept) - num_kept)
        gone = torch.argsort(loss_N, stable=True)[:num_gone]
        stays = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        stays[gone] = False
        kept = kept[stays]


def _columns(problem: Problem, experts: Sequence[int], activations: Activations) -> Callable[[Tensor, Tensor], Tensor]:
    """What makes the weighted columns, float64 [R, N], of all members' neurons on a slot's tokens with these gates."""

    def of(tokens_R: Tensor, gates_R: Tensor) -> Tensor:
        a_RN = torch.cat([activations(expert, tokens_R) for expert in experts], dim=1)
        return a_RN.double() * (gates_R.double() * problem.weight_T[tokens_R].double())[:, None]

    return of
