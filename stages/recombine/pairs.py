"""What a slot loses that a group of experts shares: the error of their output that is left once its neurons are chosen.

Dimensions: N sampled tokens, R those that a group or an expert is used for, D hidden size, E experts of the source, F neurons
of an expert, M of these that are compared, G groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from stages.contracts.layer_plan import LayerPlan, Member, RouterRow, Slot
from stages.contracts.pairing import grouped_in_runs
from stages.model.experts_forward import ExpertsForward
from stages.recombine.calls import COMPARED, FEW, LOOK, NEAR
from stages.recombine.moments import Moments
from stages.recombine.neurons import eliminate
from stages.recombine.router import ridge_rows, scores_of, sigmoid_target

SHARE = 0.3
"""Of the neurons that are left, so many go at a time."""
_BLOCK = 2048
"""Tokens whose activations are made at a time."""


@dataclass(frozen=True)
class Routed:
    """What the source's router makes of the layer's inputs x [N, D]: gates of every expert, 0 where it is not picked, [N, E];
    weight of each token. Where a stock router's rows are fitted: the router's score, logits [N, E], and columns, which are x,
    and a one where it has a bias."""

    x_ND: Tensor
    gate_NE: Tensor
    weight_N: Tensor
    score: str | None = None
    logit_NE: Tensor | None = None
    column_NX: Tensor | None = None

    def slot_gates(self) -> Callable[[Sequence[Sequence[int]]], Tensor]:
        """Given groups, the gates [N, groups] that their slots will have.

        With the source's router, the sum of the members' gates. With fitted rows, the row that a group would get gives the
        probability p of the slot; it is picked where p is at least that of the source's last pick, and its gate is p times what
        the source's gates are to the probabilities of what it picks. A single expert keeps its gate.
        """
        if self.score is None or self.logit_NE is None or self.column_NX is None:
            return self._summed
        wide = torch.float32 if self.x_ND.dtype.itemsize == 2 else torch.float64
        logit_NE, column_NX = self.logit_NE.to(wide), self.column_NX.to(wide)
        probability_NE = scores_of(self.score, logit_NE)
        is_picked_NE = self.gate_NE != 0
        scale_N1 = self.gate_NE.sum(1, keepdim=True) / (probability_NE * is_picked_NE).sum(1, keepdim=True).clamp(min=1e-30)
        least_N1 = probability_NE.masked_fill(~is_picked_NE, torch.inf).amin(1, keepdim=True)
        common_N1, total_N1 = logit_NE.mean(1, keepdim=True), logit_NE.logsumexp(1, keepdim=True)
        solve = ridge_rows(column_NX)

        def of(groups: Sequence[Sequence[int]]) -> Tensor:
            if self.score == "softmax":  # logits of a token are known up to a common number
                due_NG = torch.stack([logit_NE[:, list(group)].logsumexp(1) for group in groups], dim=1) - common_N1
                p_NG = (column_NX @ solve(due_NG).to(wide) + common_N1 - total_N1).exp()
            else:
                p_NG = torch.sigmoid(column_NX @ solve(sigmoid_target(logit_NE, groups)).to(wide))
            found_NG = torch.where(p_NG >= least_N1, p_NG * scale_N1, 0).float()
            for number, group in enumerate(groups):
                if len(group) == 1:
                    found_NG[:, number] = self.gate_NE[:, group[0]]
            return found_NG

        return of

    def _summed(self, groups: Sequence[Sequence[int]]) -> Tensor:
        return torch.stack([self.gate_NE[:, list(group)].sum(1) for group in groups], dim=1)


class _Activations:
    """Activations of the experts on the sampled tokens, kept: of all neurons of an expert, or COMPARED evenly spaced ones."""

    def __init__(self, source: ExpertsForward, x_ND: Tensor) -> None:
        self.source, self._x_ND = source, x_ND
        self._found: dict[int, tuple[Tensor, Tensor, int]] = {}

    def of(self, expert: int) -> tuple[Tensor, Tensor, int]:
        """Activations [N, M], which neurons these are [M], and how many there are."""
        if expert not in self._found:
            tokens_N = torch.arange(len(self._x_ND), device=self._x_ND.device)
            blocks = [self.source.activations_of(self._x_ND, tokens_B, expert) for tokens_B in tokens_N.split(_BLOCK)]
            size = blocks[0].shape[1]
            compared_M = torch.linspace(0, size - 1, min(size, COMPARED), device=tokens_N.device).long()
            self._found[expert] = torch.cat([a_BF[:, compared_M] for a_BF in blocks]), compared_M, size
        return self._found[expert]


@dataclass(frozen=True)
class _Member:
    """An expert on the sampled tokens. a_NM: activations of its compared neurons. tokens_R: that are routed to it. given_RD:
    what these neurons give there, times gate and weight, float32."""

    a_NM: Tensor
    tokens_R: Tensor
    given_RD: Tensor


class _Comparison:
    """Losses by one of so many neurons that have activations, and of the numbers of a hidden state; outputs are kept."""

    def __init__(self, activations: _Activations, routed: Routed, one_of: int, place: str) -> None:
        self._activations, self._routed, self._one_of, self._place = activations, routed, one_of, place
        self._members: dict[int, _Member] = {}

    def loss(self, group: Sequence[int], gate_N: Tensor) -> float:
        """|Y - H W|^2 with Y = sum_e q_e f_e(x), what the members give, and H = p [a_e(x)], what their neurons give with the
        slot's gate p [N], of which `eliminate` keeps as many as one expert has here."""
        routed, members = self._routed, [self._member(expert) for expert in group]
        is_used_N = gate_N != 0
        for member in members:
            is_used_N[member.tokens_R] = True
        tokens_R = is_used_N.nonzero().flatten()
        if not len(tokens_R):
            return 0.0
        columns_RN = torch.cat([member.a_NM[tokens_R].float() for member in members], dim=1)
        columns_RN *= (gate_N[tokens_R] * routed.weight_N[tokens_R])[:, None]
        row_N, num_columns = is_used_N.cumsum(0) - 1, columns_RN.shape[1]
        target_RD = columns_RN.new_zeros(len(tokens_R), members[0].given_RD.shape[1])
        for member in members:
            target_RD.index_add_(0, row_N[member.tokens_R], member.given_RD)
        moments = Moments.zeros(num_columns, target_RD.shape[1], tokens_R.device).with_rows(columns_RN, target_RD).whole()
        if not moments.gram_NN.any():
            return moments.total
        place = f"{self._place}, experts {tuple(group)}"
        kept, weight_DK = eliminate(moments, num_columns // len(group), place, torch.float32, SHARE)
        left = Moments(moments.gram_NN[kept][:, kept], moments.cross_ND[kept], moments.total)
        return left.error(weight_DK.T.double())

    def _member(self, expert: int) -> _Member:
        if expert not in self._members:
            a_NM, neurons_M, size = self._activations.of(expert)
            a_NM, neurons_M = a_NM[:, :: self._one_of].contiguous(), neurons_M[:: self._one_of]
            gate_N = self._routed.gate_NE[:, expert]
            tokens_R = gate_N.nonzero().flatten()
            a_RF = a_NM.new_zeros(len(tokens_R), size)
            a_RF[:, neurons_M] = a_NM[tokens_R]
            factor_R1 = (gate_N * self._routed.weight_N)[tokens_R, None]
            output_RD = self._activations.source.outputs_from(a_RF, expert)[:, :: self._one_of].float()
            self._members[expert] = _Member(a_NM, tokens_R, output_RD * factor_R1)
        return self._members[expert]


class GroupLosses:
    """The loss of any group of experts, remembered. Members' outputs are those of the source's experts, weights and all.

    Where an expert has more than FEW partners, most losses are estimates: from a first look, by fewer neurons. What the experts
    give is kept: E x N x M activations, and N x k x D outputs twice at most.
    """

    def __init__(
        self,
        source: ExpertsForward,
        routed: Routed,
        place: str,
        num_partners: int,
        known: Mapping[tuple[int, ...], float] = MappingProxyType({}),
    ) -> None:
        """num_partners: of each expert. known: losses that need not be found again, by group, ascending."""
        self._gates, self._is_many = routed.slot_gates(), num_partners > FEW
        activations = _Activations(source, routed.x_ND)
        self._comparison = _Comparison(activations, routed, 1, place)
        self._look = _Comparison(activations, routed, LOOK, place)
        self._known = dict(known)

    def __call__(self, group: Sequence[int]) -> float:
        """What a group loses: by the look, times what known losses are to theirs, where it has more than two of many experts.
        A single expert loses nothing."""
        key = tuple(sorted(group))
        if len(key) == 1:
            return 0.0
        if key not in self._known:
            gate_N = self._gates([key])[:, 0]
            if self._is_many and len(key) > 2:
                self._known[key] = self._look.loss(key, gate_N) * self._scale
            else:
                self._known[key] = self._comparison.loss(key, gate_N)
        return self._known[key]

    @cached_property
    def _scale(self) -> float:
        """What losses are to those of the look, from known pairs that have each expert once."""
        pairs = [pair for pair in self._known if len(pair) == 2 and pair[0] % 2 == 0 and pair[1] == pair[0] + 1]
        if not pairs:
            return 1.0
        looks = sum(self._look.loss(pair, gate_N) for pair, gate_N in zip(pairs, self._gates(pairs).T, strict=True))
        return sum(self._known[pair] for pair in pairs) / looks if looks else 1.0

    def of_pairs(self, expert: int, others: Sequence[int]) -> list[float]:
        """Losses of an expert with each of some others. Their rows are fitted together, not remembered.

        Of many partners, only those NEAR are compared that lose least at the first look. What the rest lose is taken from that
        look, times the most by which the loss of one that is compared differs from its own.
        """
        if not others:
            return []
        pairs = [(min(expert, other), max(expert, other)) for other in others]
        gates_PN = self._gates(pairs).T
        if not self._is_many or len(pairs) <= NEAR:
            return [self._comparison.loss(pair, gate_N) for pair, gate_N in zip(pairs, gates_PN, strict=True)]
        looks = [self._look.loss(pair, gate_N) for pair, gate_N in zip(pairs, gates_PN, strict=True)]
        near = sorted(range(len(pairs)), key=lambda number: (looks[number], number))[:NEAR]
        found = {number: self._comparison.loss(pairs[number], gates_PN[number]) for number in near}
        factor = max((found[number] / looks[number] for number in near if looks[number] > 0), default=1.0)
        return [found.get(number, look * factor) for number, look in enumerate(looks)]


def paired_plan(plan: LayerPlan, losses: Callable[[Sequence[int]], float], used_E: Tensor, num_runs: int) -> LayerPlan:
    """A plan of as many slots whose groups lose least together, with members and router rows weighed by use.

    used_E: tokens that are routed to each expert. num_runs: groups of equally many experts, in order, in which slots stay.
    """
    slots = []
    for group in grouped_in_runs(plan.num_experts, len(plan.slots), num_runs, losses):
        total = float(used_E[group].sum())
        shares = [(expert, float(used_E[expert]) / total if total else 1 / len(group)) for expert in group]
        slots.append(
            Slot(
                tuple(group),
                tuple(Member(expert, share) for expert, share in shares),
                row=RouterRow(tuple(shares)) if plan.slots[0].row is not None else None,
                is_unweighted=not total,
            )
        )
    return LayerPlan(plan.layer, plan.num_experts, tuple(slots))
