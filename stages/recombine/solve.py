"""W_down of all slots of a layer by ridge regression on what the layer's experts have to give.

Dimensions: T tokens, R tokens that are routed to a slot, D hidden size, F neurons of a slot, S slots, N = S F.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from stages.recombine.calls import HELD_OUT, SWEEPS, Bounds
from stages.recombine.factor import Factor, factor_of
from stages.recombine.moments import Moments, down, product

RIDGES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Shares of the mean diagonal of the moments, of which the held-out tokens choose."""
FIRST_RIDGE = 1e-2
"""Where the search among RIDGES begins, and what is used where a solution is only a start."""
_BLOCK = 2048
"""Tokens whose columns are made at a time."""
_REMEDY = "set refit.ridge to a larger number"


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

    def every(self, step: int) -> "SlotTokens":
        """One of so many."""
        return SlotTokens(self.tokens_R[::step], self.gates_R[::step])

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and gates, so many at a time as columns are made for."""
        return zip(self.tokens_R.split(_BLOCK), self.gates_R.split(_BLOCK), strict=True)


@dataclass(frozen=True)
class Problem:
    """What is to be solved.

    slots: routing to each slot. activations: of a slot on some tokens [R, F]. target_TD: what the slots' outputs, less their
    biases, have to add up to. weight_T: of each token. start: W_down [D, F] of each slot as it is. lengths: tokens of each
    sequence; they stand in order. wide: dtype of columns and their products over a block of tokens: float32 for a model of 16
    bits, else float64. Sums over blocks are float64.
    """

    slots: Sequence[SlotTokens]
    activations: Callable[[int, Tensor], Tensor]
    target_TD: Tensor
    weight_T: Tensor
    start: Sequence[Tensor]
    place: str
    lengths: Sequence[int]
    wide: torch.dtype = torch.float64

    @property
    def weighted_TD(self) -> Tensor:
        """The target of each token times its weight, in `wide`."""
        return self.target_TD.to(self.wide) * self.weight_T.to(self.wide)[:, None]

    @property
    def held_T(self) -> Tensor:
        """Which tokens choose the ridge."""
        return held_tokens(self.lengths, self.target_TD.device)

    def columns(self, slot: int, tokens_R: Tensor, gates_R: Tensor) -> Tensor:
        """Weighted columns of a slot on some of its tokens, [R, F] in `wide`."""
        return self.scaled(self.activations(slot, tokens_R), tokens_R, gates_R)

    def scaled(self, rows_RN: Tensor, tokens_R: Tensor, gates_R: Tensor) -> Tensor:
        """A row for each token, times gate and weight of the token, in `wide`."""
        return rows_RN.to(self.wide) * (gates_R.to(self.wide) * self.weight_T[tokens_R].to(self.wide))[:, None]

    def given(self, slot: int, tokens_R: Tensor, gates_R: Tensor, weight_DF: Tensor) -> Tensor:
        """What a slot with these weights gives to some of its tokens, weighted as the target is, [R, D] in `wide`."""
        return self.scaled(down(self.activations(slot, tokens_R), weight_DF, self.wide), tokens_R, gates_R)

    def add(self, left_TD: Tensor, number: int, slot: SlotTokens, weight_DF: Tensor) -> None:
        """Add what a slot gives with these weights."""
        for tokens_R, gates_R in slot.blocks():
            left_TD.index_add_(0, tokens_R, self.given(number, tokens_R, gates_R, weight_DF))


def held_tokens(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Which tokens [T] choose the ridge: every eighth sequence, so that no domain is left out on either side, whatever their
    order; of fewer than eight sequences, shorter pieces. lengths: tokens of each sequence."""
    if len(lengths) >= HELD_OUT:
        piece_T = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    else:
        num_tokens = sum(lengths)
        piece_T = torch.arange(num_tokens, device=device) // max(1, num_tokens // HELD_OUT)
    return piece_T % HELD_OUT == HELD_OUT - 1


@dataclass(frozen=True)
class Solution:
    """weights: W_down float32 [D, F] of each slot. ridge: the strength that was used. error_before, error_after: weighted
    squared error over that of giving nothing, on all tokens. error_unseen: on the held-out tokens, of a solution from the
    others; where slots are solved one after another, error_after. total_unseen: the squared error of giving nothing on these
    tokens."""

    weights: tuple[Tensor, ...]
    ridge: float
    error_before: float
    error_after: float
    error_unseen: float
    total_unseen: float


def solve(problem: Problem, ridge: float | None, bounds: Bounds, sweeps: int = SWEEPS) -> Solution:
    """Minimise sum_t weight_t^2 |target_t - sum_s gate_ts W_s a_s(x_t)|^2 + ridge * mean(diag A) * |W - start|^2.

    ridge: None for the one of RIDGES with the least error on the held-out tokens, from a solution on the others. All slots
    together where the bounds allow it, else slot after slot, in so many sweeps.
    """
    if sum(weight.shape[1] for weight in problem.start) <= bounds.joint_columns:
        return _joint(problem, ridge)
    return _one_by_one(problem, ridge, sweeps, bounds)


def error_of_start(problem: Problem, is_unseen: bool = False) -> float:
    """Squared error of the start over that of giving nothing: on all tokens, or on those that choose the ridge."""
    left_TD, tokens_T = problem.weighted_TD, problem.held_T if is_unseen else torch.ones_like(problem.held_T)
    total = _energy(left_TD[tokens_T])
    for number, slot in enumerate(problem.slots):
        problem.add(left_TD, number, slot.of(tokens_T[slot.tokens_R]), -problem.start[number])
    return _energy(left_TD[tokens_T]) / total if total else 0.0


def _ridge_solution(moments: Moments, start_ND: Tensor, ridge: float, place: str, right_ND: Tensor | None = None) -> Tensor:
    """W [N, D], pulled towards the start. right_ND: C - A start, if it is at hand."""
    if not moments.gram_NN.any():  # no token is routed here: nothing to go by
        return start_ND
    factor = factor_of(moments.gram_NN, ridge, place, _REMEDY)
    if right_ND is None:
        right_ND = moments.cross_ND - moments.gram_NN @ start_ND
    return start_ND + factor.solve(right_ND)


def _chosen(train: Moments, held: Moments, start_ND: Tensor, ridge: float | None, place: str) -> tuple[float, float]:
    """The ridge, and what the solution that it gives on the tokens that are not held out leaves of the held-out ones.

    Of RIDGES, the first on the way down from FIRST_RIDGE whose neighbours both leave more error on the held-out tokens.
    """
    right_ND = train.cross_ND - train.gram_NN @ start_ND

    def error(some: float) -> float:
        return held.error(_ridge_solution(train, start_ND, some, place, right_ND))

    if ridge is not None:
        return ridge, error(ridge)
    error_of, best = cache(lambda number: error(RIDGES[number])), RIDGES.index(FIRST_RIDGE)
    while (least := min(range(max(0, best - 1), min(best + 2, len(RIDGES))), key=error_of)) != best:
        best = least
    return RIDGES[best], error_of(best)


def _joint(problem: Problem, ridge: float | None) -> Solution:
    train, held = _joint_moments(problem)
    start_ND = torch.cat([weight.double().T for weight in problem.start])
    place = f"{problem.place}, slots 0 to {len(problem.start) - 1} together"
    chosen, error_unseen = _chosen(train, held, start_ND, ridge, place)
    unseen, total_unseen = error_unseen / held.total, held.total
    both = train + held
    del train, held
    weight_ND = _ridge_solution(both, start_ND, chosen, place)
    sizes = [weight.shape[1] for weight in problem.start]
    return Solution(
        tuple(part.T.float().contiguous() for part in weight_ND.split(sizes)),
        chosen,
        both.error(start_ND) / both.total,
        both.error(weight_ND) / both.total,
        unseen,
        total_unseen,
    )


def _joint_moments(problem: Problem) -> tuple[Moments, Moments]:
    """Moments of all slots' columns on the tokens that are solved for, and on those that are held out."""
    device, hidden_size = problem.target_TD.device, problem.target_TD.shape[1]
    sizes, held_T = [weight.shape[1] for weight in problem.start], problem.held_T
    found = [Moments.zeros(sum(sizes), hidden_size, device) for _ in range(2)]
    weighted_TD = problem.weighted_TD
    for first in range(0, len(held_T), _BLOCK):
        stop = min(first + _BLOCK, len(held_T))
        columns_BN = torch.zeros(stop - first, sum(sizes), dtype=problem.wide, device=device)
        begin = 0
        for number, (slot, size) in enumerate(zip(problem.slots, sizes, strict=True)):
            inside = slot.of((slot.tokens_R >= first) & (slot.tokens_R < stop))
            columns_R = problem.columns(number, inside.tokens_R, inside.gates_R)
            columns_BN[inside.tokens_R - first, begin : begin + size] = columns_R
            begin += size
        for number, moments in enumerate(found):
            chosen_B = held_T[first:stop] == bool(number)
            found[number] = moments.with_rows(columns_BN[chosen_B], weighted_TD[first:stop][chosen_B])
    return found[0].whole(), found[1].whole()


class _Columns:
    """Columns of the slots, block by block: of tokens that are not held out, then of those that are.

    Activations are kept where the bounds allow it, and made again where not: block by block alike, so that no bit depends on
    it.
    """

    def __init__(self, problem: Problem, bounds: Bounds) -> None:
        self._problem = problem
        self._parts = [[part for one in slot.split(problem.held_T) for part in one.blocks()] for slot in problem.slots]
        self._num_train = [len([*slot.split(problem.held_T)[0].blocks()]) for slot in problem.slots]
        values = sum(len(slot.tokens_R) * one.shape[1] for slot, one in zip(problem.slots, problem.start, strict=True))
        self._keeps = values * problem.wide.itemsize // 2 <= 8 * bounds.activation_values
        self._kept: dict[int, list[Tensor]] = {}

    def of(self, number: int) -> Iterator[tuple[bool, SlotTokens, Tensor]]:
        """Whether a block is held out, its tokens, and the slot's activations on them [R, F]."""
        kept = self._kept.get(number, [])
        for block, (tokens_R, gates_R) in enumerate(self._parts[number]):
            a_RF = kept[block] if block < len(kept) else self._problem.activations(number, tokens_R)
            if self._keeps and block >= len(kept):
                kept = self._kept.setdefault(number, kept)
                kept.append(a_RF)
            yield block >= self._num_train[number], SlotTokens(tokens_R, gates_R), a_RF

    def moments(self, number: int, left_TD: Tensor) -> tuple[Moments, Moments]:
        """Of the tokens that are not held out, and of those that are, with what is left of the target."""
        size = self._problem.start[number].shape[1]
        found = [Moments.zeros(size, left_TD.shape[1], left_TD.device) for _ in range(2)]
        for is_held, slot, a_RF in self.of(number):
            columns_RF = self._problem.scaled(a_RF, slot.tokens_R, slot.gates_R)
            found[is_held] = found[is_held].with_rows(columns_RF, left_TD[slot.tokens_R])
        return found[0].whole(), found[1].whole()

    def cross(self, number: int, left_TD: Tensor) -> Tensor:
        """H^T [what is left] over all tokens, float64 [F, D]."""
        size = self._problem.start[number].shape[1]
        found = [torch.zeros(size, left_TD.shape[1], dtype=torch.float64, device=left_TD.device) for _ in range(2)]
        for is_held, slot, a_RF in self.of(number):
            columns_RF = self._problem.scaled(a_RF, slot.tokens_R, slot.gates_R)
            found[is_held] += product(columns_RF.T, left_TD[slot.tokens_R])
        return found[0] + found[1]

    def add(self, left_TD: Tensor, number: int, weight_DF: Tensor) -> None:
        """Add what a slot gives with these weights."""
        for _, slot, a_RF in self.of(number):
            output_RD = down(a_RF, weight_DF, self._problem.wide)
            left_TD.index_add_(0, slot.tokens_R, self._problem.scaled(output_RD, slot.tokens_R, slot.gates_R))


def _one_by_one(problem: Problem, ridge: float | None, sweeps: int, bounds: Bounds) -> Solution:
    """Gauss-Seidel over slots: each is solved on what the others leave. The ridge is that of the first sweep's first slot.

    With R what all slots leave, a slot's weights change by what solves (A + ridge) d = H^T R - ridge (W - start). Where the
    bounds allow it, factors of all slots stay for later sweeps, in which only H^T R is new.
    """
    keeps = sweeps > 1 and 2 * sum(weight.shape[1] ** 2 for weight in problem.start) <= bounds.moment_values
    columns, left_TD = _Columns(problem, bounds), problem.weighted_TD
    total = _energy(left_TD)
    weights = [weight.double() for weight in problem.start]
    for number in range(len(weights)):
        columns.add(left_TD, number, -weights[number])
    before = _energy(left_TD)
    chosen = ridge
    kept: dict[int, Factor] = {}
    for _ in range(sweeps):
        for number, slot in enumerate(problem.slots):
            if not len(slot.tokens_R):  # nothing to go by
                continue
            start_ND, old_ND = problem.start[number].double().T, weights[number].T
            if number in kept:
                factor, cross_ND = kept[number], columns.cross(number, left_TD)
            else:
                place = f"{problem.place}, slot {number}"
                train, held = columns.moments(number, left_TD)
                if chosen is None:
                    chosen, _ = _chosen(train.with_own(old_ND), held.with_own(old_ND), start_ND, None, place)
                cross_ND = train.cross_ND + held.cross_ND
                factor = factor_of(train.gram_NN.add_(held.gram_NN), chosen, place, _REMEDY)
                if keeps:
                    kept[number] = factor
            change_ND = factor.solve(cross_ND - factor.shift * (old_ND - start_ND))
            columns.add(left_TD, number, -change_ND.T)
            weights[number] = (old_ND + change_ND).T
    after = _energy(left_TD) / total
    solved = tuple(weight.float().contiguous() for weight in weights)
    return Solution(solved, FIRST_RIDGE if chosen is None else chosen, before / total, after, after, total)


def _energy(left_TD: Tensor) -> float:
    return float(sum(part.double().square().sum() for part in left_TD.split(_BLOCK)))
