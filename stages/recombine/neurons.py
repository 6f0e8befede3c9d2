"""Which neurons a slot keeps, of all that its members have: those whose loss a new W_down makes good least.

Dimensions: R tokens that are routed to a slot, D hidden size, F neurons of an expert, N neurons of all members, S slots.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stages.contracts.layer_plan import LayerPlan, Member, Slot
from stages.recombine.solve import Moments, Problem, SlotTokens, factor_of, held_out_from

RIDGE = 1e-2
"""Of the mean diagonal of the moments, while neurons are eliminated."""
SHARE = 0.15
"""Of the neurons that are left, so many go at a time."""
_BLOCK = 2048


def chosen_plan(
    plan: LayerPlan, problem: Problem, solved: Sequence[Tensor], activations: Callable[[int, Tensor], Tensor]
) -> tuple[LayerPlan, list[Tensor]]:
    """A plan whose slots of several members hold whole neurons of theirs, as many as an expert has; and W_down [D, F] of each.

    Slot after slot: what the others leave of the target is what a slot's neurons have to give. problem, solved: of the plan as
    it is, and W_down that solves it. activations: of an expert of the source on some tokens [R, F].
    """
    left_TD = problem.target_TD.double() * problem.weight_T.double()[:, None]
    weights = [weight.double() for weight in solved]
    for number, tokens in enumerate(problem.slots):
        problem.add(left_TD, number, tokens, -weights[number])
    slots = list(plan.slots)
    for number, slot in enumerate(plan.slots):
        is_seen = bool((problem.slots[number].tokens_R < held_out_from(len(left_TD))).any())
        if len(slot.members) == 1 or not is_seen:  # no token says which neurons matter: the average stays
            continue
        problem.add(left_TD, number, problem.slots[number], weights[number])
        size = weights[number].shape[1]
        experts = [member.expert for member in slot.members]
        columns = _Columns(problem, problem.slots[number], experts, activations)
        kept, weight_DF = eliminate(columns.moments(left_TD), size, f"{problem.place}, slot {number}")
        slots[number] = _joined(slot, kept.tolist(), size)
        columns.add(left_TD, kept, -weight_DF)
        weights[number] = weight_DF
    return replace(plan, slots=tuple(slots)), [weight.float() for weight in weights]


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
        factor = factor_of(some.gram_NN, RIDGE, place)
        weight_ND = torch.cholesky_solve(some.cross_ND, factor)
        if len(kept) == num_kept:
            return kept, weight_ND.T.contiguous()
        loss_N = weight_ND.square().sum(1) / torch.cholesky_inverse(factor).diagonal()
        num_gone = min(max(1, int(SHARE * len(kept))), len(kept) - num_kept)
        gone = torch.argsort(loss_N, stable=True)[:num_gone]
        stays = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
        stays[gone] = False
        kept = kept[stays]


def _blocks(slot: SlotTokens) -> list[tuple[Tensor, Tensor]]:
    return list(zip(slot.tokens_R.split(_BLOCK), slot.gates_R.split(_BLOCK), strict=True))


class _Columns:
    """Weighted columns of all members' neurons on a slot's tokens, made anew where they are needed."""

    def __init__(
        self, problem: Problem, slot: SlotTokens, experts: Sequence[int], activations: Callable[[int, Tensor], Tensor]
    ) -> None:
        self._problem, self._slot, self._experts, self._activations = problem, slot, experts, activations

    def _of(self, tokens_R: Tensor, gates_R: Tensor) -> Tensor:
        a_RN = torch.cat([self._activations(expert, tokens_R) for expert in self._experts], dim=1)
        return a_RN.double() * (gates_R.double() * self._problem.weight_T[tokens_R].double())[:, None]

    def moments(self, left_TD: Tensor) -> Moments:
        """Moments of the columns with what is left of the target, on the tokens that do not choose the ridge afterwards."""
        found: Moments | None = None
        seen_R = self._slot.tokens_R < held_out_from(len(left_TD))
        seen = SlotTokens(self._slot.tokens_R[seen_R], self._slot.gates_R[seen_R])
        for tokens_R, gates_R in _blocks(seen):
            columns_RN, target_RD = self._of(tokens_R, gates_R), left_TD[tokens_R]
            part = Moments(columns_RN.T @ columns_RN, columns_RN.T @ target_RD, float(target_RD.square().sum()))
            found = part if found is None else found + part
        assert found is not None
        return found

    def add(self, left_TD: Tensor, kept: Tensor, weight_DF: Tensor) -> None:
        """Add what some neurons give with these weights."""
        for tokens_R, gates_R in _blocks(self._slot):
            left_TD.index_add_(0, tokens_R, self._of(tokens_R, gates_R)[:, kept] @ weight_DF.T)
