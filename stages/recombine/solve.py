"""W_down of all slots of a layer by ridge regression on what the layer's experts have to give.

Dimensions: T tokens, R tokens that are routed to a slot, D hidden size, F neurons of a slot, S slots, N = S F.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stages.contracts.errors import InputError
from stages.recombine.spec import JOINT_COLUMNS

RIDGES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Shares of the mean diagonal of the moments, of which the held-out tokens choose."""
HELD_OUT = 8
"""One sequence of so many chooses, and nothing else may have seen it."""
SWEEPS = 2
_BLOCK = 2048
"""Tokens whose columns are made at a time."""


@dataclass(frozen=True)
class SlotTokens:
    """Tokens that are routed to a slot, ascending, and the sum of the weights that routing gives it there, float32 [R]."""

    tokens_R: Tensor
    gates_R: Tensor

    def of(self, chosen_R: Tensor) -> "SlotTokens":
        """Those for which chosen_R is true."""
        return SlotTokens(self.tokens_R[chosen_R], self.gates_R[chosen_R])

    def split(self, held_T: Tensor) -> tuple["SlotTokens", "SlotTokens"]:
        """Those of the tokens that are not held out, and those that are."""
        held_R = held_T[self.tokens_R]
        return self.of(~held_R), self.of(held_R)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and gates, so many at a time as columns are made for."""
        return zip(self.tokens_R.split(_BLOCK), self.gates_R.split(_BLOCK), strict=True)


@dataclass(frozen=True)
class Problem:
    """What is to be solved.

    slots: routing to each slot. activations: of a slot on some tokens [R, F]. target_TD: what the slots' outputs, less their
    biases, have to add up to. weight_T: of each token. start: W_down [D, F] of each slot as it is. sequence_length: tokens of a
    sequence; they stand in order.
    """

    slots: Sequence[SlotTokens]
    activations: Callable[[int, Tensor], Tensor]
    target_TD: Tensor
    weight_T: Tensor
    start: Sequence[Tensor]
    place: str
    sequence_length: int

    @property
    def held_T(self) -> Tensor:
        """Which tokens choose the ridge: every eighth sequence, so that no domain is left out on either side, whatever their
        order; of fewer than eight sequences, shorter pieces."""
        num_tokens = len(self.target_TD)
        length = max(1, min(self.sequence_length, num_tokens // HELD_OUT))
        piece_T = torch.arange(num_tokens, device=self.target_TD.device) // length
        return piece_T % HELD_OUT == HELD_OUT - 1

    def columns(self, slot: int, tokens_R: Tensor, gates_R: Tensor) -> Tensor:
        """Weighted columns of a slot on some of its tokens, float64 [R, F]."""
        scale_R = gates_R.double() * self.weight_T[tokens_R].double()
        return self.activations(slot, tokens_R).double() * scale_R[:, None]

    def add(self, left_TD: Tensor, number: int, slot: SlotTokens, weight_DF: Tensor) -> None:
        """Add what a slot gives with these weights, weighted as the target is."""
        for tokens_R, gates_R in slot.blocks():
            left_TD.index_add_(0, tokens_R, self.columns(number, tokens_R, gates_R) @ weight_DF.T)


@dataclass(frozen=True)
class Solution:
    """weights: W_down float32 [D, F] of each slot. ridge: the strength that was used. error_before, error_after: weighted
    squared error over that of giving nothing, on all tokens. error_unseen: on the held-out tokens, of a solution from the
    others; where slots are solved one after another, error_after."""

    weights: tuple[Tensor, ...]
    ridge: float
    error_before: float
    error_after: float
    error_unseen: float


def solve(problem: Problem, ridge: float | None) -> Solution:
    """Minimise sum_t weight_t^2 |target_t - sum_s gate_ts W_s a_s(x_t)|^2 + ridge * mean(diag A) * |W - start|^2.

    ridge: None for the one of RIDGES with the least error on the held-out tokens, from a solution on the others.
    """
    num_columns = sum(weight.shape[1] for weight in problem.start)
    return _joint(problem, ridge) if num_columns <= JOINT_COLUMNS else _one_by_one(problem, ridge)


@dataclass(frozen=True)
class Moments:
    """A = H^T H [N, N], C = H^T Y [N, D] and |Y|^2 over some tokens, float64."""

    gram_NN: Tensor
    cross_ND: Tensor
    total: float

    @classmethod
    def zeros(cls, num_columns: int, hidden_size: int, device: torch.device) -> "Moments":
        """Of no tokens."""
        gram_NN = torch.zeros(num_columns, num_columns, dtype=torch.float64, device=device)
        return cls(gram_NN, torch.zeros(num_columns, hidden_size, dtype=torch.float64, device=device), 0.0)

    def with_rows(self, columns_RN: Tensor, target_RD: Tensor) -> "Moments":
        """With some tokens added, in place."""
        self.gram_NN.addmm_(columns_RN.T, columns_RN)
        self.cross_ND.addmm_(columns_RN.T, target_RD)
        return Moments(self.gram_NN, self.cross_ND, self.total + float(target_RD.square().sum()))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram_NN + other.gram_NN, self.cross_ND + other.cross_ND, self.total + other.total)

    def error(self, weight_ND: Tensor) -> float:
        """|Y - H W|^2, from the moments alone."""
        linear = float((weight_ND * self.cross_ND).sum())
        return self.total - 2 * linear + float((weight_ND * (self.gram_NN @ weight_ND)).sum())


def slot_moments(columns: Callable[[Tensor, Tensor], Tensor], num_columns: int, slot: SlotTokens, left_TD: Tensor) -> Moments:
    """Moments of a slot's columns with what is left of the target. columns: float64 [R, N] of some tokens and gates."""
    found = Moments.zeros(num_columns, left_TD.shape[1], left_TD.device)
    for tokens_R, gates_R in slot.blocks():
        found = found.with_rows(columns(tokens_R, gates_R), left_TD[tokens_R])
    return found


def factor_of(gram_NN: Tensor, ridge: float, place: str, remedy: str) -> Tensor:
    """Cholesky factor [N, N] of moments and a ridge. Raises InputError where they are not positive definite in spite of it.

    remedy: what the user may do then, an imperative.
    """
    gram_NN = gram_NN.clone()
    gram_NN.diagonal().add_(ridge * float(gram_NN.diagonal().mean()))
    factor, info = torch.linalg.cholesky_ex(gram_NN)
    if int(info):
        raise InputError(
            f"{place}: the moments of {len(gram_NN)} columns are not positive definite at ridge {ridge:g} (column "
            f"{int(info)}); {remedy}"
        )
    return factor  # type: ignore[no-any-return]


def _ridge_solution(moments: Moments, start_ND: Tensor, ridge: float, place: str) -> Tensor:
    """W [N, D], pulled towards the start."""
    if not moments.gram_NN.any():  # no token is routed here: nothing to go by
        return start_ND
    factor = factor_of(moments.gram_NN, ridge, place, "set refit.ridge to a larger number")
    return start_ND + torch.cholesky_solve(moments.cross_ND - moments.gram_NN @ start_ND, factor)


def _chosen(train: Moments, held: Moments, start_ND: Tensor, ridge: float | None, place: str) -> float:
    if ridge is not None:
        return ridge
    errors = {one: held.error(_ridge_solution(train, start_ND, one, place)) for one in RIDGES}
    return min(RIDGES, key=lambda one: errors[one])


def _joint(problem: Problem, ridge: float | None) -> Solution:
    train, held = _joint_moments(problem)
    start_ND = torch.cat([weight.double().T for weight in problem.start])
    chosen = _chosen(train, held, start_ND, ridge, problem.place)
    both = train + held
    weight_ND = _ridge_solution(both, start_ND, chosen, problem.place)
    sizes = [weight.shape[1] for weight in problem.start]
    return Solution(
        tuple(part.T.float().contiguous() for part in weight_ND.split(sizes)),
        chosen,
        both.error(start_ND) / both.total,
        both.error(weight_ND) / both.total,
        held.error(_ridge_solution(train, start_ND, chosen, problem.place)) / held.total,
    )


def _joint_moments(problem: Problem) -> tuple[Moments, Moments]:
    """Moments of all slots' columns on the tokens that are solved for, and on those that are held out."""
    device, hidden_size = problem.target_TD.device, problem.target_TD.shape[1]
    sizes, held_T = [weight.shape[1] for weight in problem.start], problem.held_T
    found = [Moments.zeros(sum(sizes), hidden_size, device) for _ in range(2)]
    for first in range(0, len(held_T), _BLOCK):
        stop = min(first + _BLOCK, len(held_T))
        columns_BN = torch.zeros(stop - first, sum(sizes), dtype=torch.float64, device=device)
        begin = 0
        for number, (slot, size) in enumerate(zip(problem.slots, sizes, strict=True)):
            inside = slot.of((slot.tokens_R >= first) & (slot.tokens_R < stop))
            columns_R = problem.columns(number, inside.tokens_R, inside.gates_R)
            columns_BN[inside.tokens_R - first, begin : begin + size] = columns_R
            begin += size
        target_BD = problem.target_TD[first:stop].double() * problem.weight_T[first:stop].double()[:, None]
        for number, moments in enumerate(found):
            chosen_B = held_T[first:stop] == bool(number)
            found[number] = moments.with_rows(columns_BN[chosen_B], target_BD[chosen_B])
    return found[0], found[1]


def _one_by_one(problem: Problem, ridge: float | None) -> Solution:
    """Gauss-Seidel over slots: each is solved on what the others leave. The ridge is that of the first sweep's first slot."""
    weight_T1 = problem.weight_T.double()[:, None]
    left_TD = problem.target_TD.double() * weight_T1
    total = float(left_TD.square().sum())
    weights = [weight.double() for weight in problem.start]
    for number, slot in enumerate(problem.slots):
        problem.add(left_TD, number, slot, -weights[number])
    before = float(left_TD.square().sum())
    chosen = ridge
    held_T = problem.held_T
    for _ in range(SWEEPS):
        for number, slot in enumerate(problem.slots):
            problem.add(left_TD, number, slot, weights[number])
            train, held = (
                slot_moments(partial(problem.columns, number), weights[number].shape[1], part, left_TD)
                for part in slot.split(held_T)
            )
            start_ND = problem.start[number].double().T
            chosen = _chosen(train, held, start_ND, ridge if ridge is not None else chosen, problem.place)
            weights[number] = _ridge_solution(train + held, start_ND, chosen, problem.place).T
            problem.add(left_TD, number, slot, -weights[number])
    assert chosen is not None
    after = float(left_TD.square().sum()) / total
    return Solution(tuple(weight.float().contiguous() for weight in weights), chosen, before / total, after, after)
