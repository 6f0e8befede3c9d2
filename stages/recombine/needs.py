"""What a refitted target needs, for `plan`: memory, operations, disk, tokens. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from stages.contracts.partition import held_bytes, weight_bytes
from stages.contracts.spec import Run, narrowed_to
from stages.contracts.survey import Survey
from stages.contracts.targets import Target
from stages.contracts.tensors import num_neurons
from stages.contracts.text_settings import Calibration
from stages.recombine.calls import (
    CHOICE_COLUMNS,
    COMPARED,
    FEW,
    HELD_OUT,
    JOINT_COLUMNS,
    LOOK,
    NEAR,
    SAMPLED,
    SHARE,
    SWEEPS,
    Bounds,
    choice_bytes,
    moment_bytes,
    num_candidates,
)
from stages.recombine.pairing import is_fitted, pairs_of

_SIDES, _CHOICE_SIDES = 9, 2
"""Matrices of float64 with a row for each column and as many numbers as a hidden state has, that a solution and a choice hold
at a time."""
NUM_RIDGES = 5
"""Ridges that a search among eight usually tries."""
_SHARED = re.compile(r"\.shared[^.]*\.down_proj\.weight$")
"""Names of the matrices that `SharedExpert` finds."""


class Work(NamedTuple):
    """Operations of matrix products, and of Cholesky factors and inverses, which are slower."""

    products: float
    factors: float


def _total(works: Iterable[Work]) -> Work:
    products, factors = 0.0, 0.0
    for work in works:
        products, factors = products + work.products, factors + work.factors
    return Work(products, factors)


@dataclass(frozen=True)
class LayerNeeds:
    """Of a layer of a target. All slots count as of equal size.

    num_slots, kept: slots, and neurons of each. candidates: neurons that a slot chooses from; 0 if it does not. wanted: those
    for which a worker would need more memory, too. tokens: that are routed to a slot. hidden_size; all_tokens. itemsize: of a
    value of the model. neurons: of an expert of the source. shared: neurons of a shared expert that is solved, too; else 0.
    num_plans: that are solved and compared.
    """

    num_slots: int
    kept: int
    candidates: int
    wanted: int
    tokens: int
    hidden_size: int
    all_tokens: int
    itemsize: int
    bounds: Bounds
    is_fitted: bool
    compares_pairs: bool
    num_experts: int
    top_k: int
    neurons: int
    shared: int
    num_plans: int

    @property
    def columns(self) -> int:
        """Columns of W_down that are solved for, of all slots and a shared expert."""
        return self.num_slots * self.kept + self.shared

    @property
    def is_joint(self) -> bool:
        """Whether all slots are solved for together."""
        return self.columns <= self.bounds.joint_columns

    @property
    def router_unknowns(self) -> int:
        """Numbers of a stock router that take a Gauss-Newton step together; 0 if they take none."""
        unknowns = self.num_slots * self.hidden_size
        return unknowns if self.is_fitted and unknowns <= JOINT_COLUMNS else 0

    @property
    def moment_bytes(self) -> int:
        """Memory in bytes of the matrices of moments and of their factors, of the largest step on one worker."""
        largest = max(self.kept, self.shared)
        columns = self.columns if self.is_joint else largest
        num_bytes = max(moment_bytes(max(columns, self.router_unknowns)), choice_bytes(self.candidates))
        kept_values = 2 * (self.num_slots * self.kept**2 + self.shared**2)
        if self.is_joint or kept_values > self.bounds.moment_values:
            return num_bytes
        return max(num_bytes, 8 * kept_values + moment_bytes(largest))

    @property
    def start_bytes(self) -> int:
        """Memory in bytes, beside the layer, of a worker that compares pairs or starts a plan: the tokens; the experts of two
        plans."""
        return self.token_bytes + 2 * self._student_bytes

    @property
    def choose_bytes(self) -> int:
        """The same of one that chooses neurons: the tokens; the plan's experts, their W_down in float32; moments and what is
        made of these, with as many right-hand sides as a hidden state has numbers."""
        weights = 4 * self.num_slots * self.neurons * self.hidden_size
        sides = 8 * _CHOICE_SIDES * self.candidates * self.hidden_size
        return self.token_bytes + self._student_bytes + weights + choice_bytes(self.candidates) + sides

    @property
    def solve_bytes(self) -> int:
        """The same of one that solves: the tokens; the plan's experts; W_down as it was, as it is and as it is written, and
        that of each plan that is compared; moments and what is made of these."""
        weights = self.columns * self.hidden_size * (4 + 8 + 4 + 4 * self.num_plans)
        solved = self.columns if self.is_joint else max(self.kept, self.shared)
        sides = 8 * _SIDES * solved * self.hidden_size
        return self.token_bytes + self._student_bytes + weights + self.moment_bytes + sides

    @property
    def _student_bytes(self) -> int:
        """Memory in bytes of a plan's experts: gate, up and down."""
        return 3 * self.num_slots * self.neurons * self.hidden_size * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Memory in bytes of what a worker that solves or chooses holds of all tokens: the experts' input and the target, each
        in pieces and in one; the target as it is solved for, of each plan, and what is left of it; a router's input;
        activations of all slots where the bounds have room for them, or of the experts whose pairs are compared."""
        wide = 4 if self.itemsize == 2 else 8
        values = self.all_tokens * self.hidden_size
        activations = (self.num_slots * self.tokens * self.kept + self.all_tokens * self.shared) * self.itemsize
        if self.is_joint or activations > 8 * self.bounds.activation_values:
            activations = 0
        of_plans = 4 * self.num_plans
        held = values * (2 * self.itemsize + 2 * 4 + 2 * wide + of_plans + (self.itemsize if self.is_fitted else 0))
        return held + max(activations, self.compare_bytes)

    @property
    def compare_bytes(self) -> int:
        """Memory in bytes of what the experts give on the sampled tokens, kept while pairs are compared."""
        if not self.compares_pairs:
            return 0
        activations = self.num_experts * min(COMPARED, self.neurons) * self.itemsize
        outputs = self.top_k * self.hidden_size * 4
        looks = (activations + outputs) // LOOK if self._has_many_experts else 0
        return self.sampled * (activations + outputs + looks)

    @property
    def _has_many_experts(self) -> bool:
        """Whether an expert looks at all its partners before some are compared."""
        return self.num_experts - 1 > FEW

    @property
    def sampled(self) -> int:
        """Tokens that pairs are compared on."""
        return min(SAMPLED, self.all_tokens)

    @property
    def choose_work(self) -> Work:
        """Operations of a slot's choice: half of A of its candidates; C; what the members give; factor, inverse, solution;
        rounds of elimination."""
        n, t, d = self.candidates, self.tokens, self.hidden_size
        moments = t * n * n + 4 * t * n * d
        sizes = [float(n)]
        while sizes[-1] > self.kept:
            sizes.append(max((1 - SHARE) * sizes[-1], self.kept))
        rounds = sum(2 * after**2 * (before - after) for before, after in pairwise(sizes))
        return Work(moments + 2 * n * n * d + rounds, n**3)

    @property
    def compare_work(self) -> Work:
        """Operations of the comparison of all pairs, where they are chosen anew."""
        if not self.compares_pairs:
            return Work(0, 0)
        return _total([self.activations_work, *(self.pairs_work(later) for later in range(self.num_experts))])

    @property
    def activations_work(self) -> Work:
        """Operations of what all experts give on the sampled tokens."""
        return Work(self.num_experts * self.sampled * 4.0 * self.hidden_size * self.neurons, 0)

    def pairs_work(self, num_others: int) -> Work:
        """Operations of an expert's comparison with some others."""
        if not self._has_many_experts or num_others <= NEAR:
            return self._losses_work(num_others, 2, 1)
        return _total((self._losses_work(NEAR, 2, 1), self._losses_work(num_others, 2, LOOK)))

    @property
    def groups_work(self) -> Work:
        """Operations of the losses of pairs of groups, round after round, until there are as many groups as slots; on one
        worker, before it solves."""
        if not self.compares_pairs:
            return Work(0, 0)
        works, num_groups, size = list[Work](), -(-self.num_experts // 2), 4
        while num_groups > self.num_slots:
            works.append(self._losses_work(num_groups * (num_groups - 1) // 2, size, LOOK if self._has_many_experts else 1))
            num_groups, size = -(-num_groups // 2), 2 * size
        return _total(works)

    def _losses_work(self, num_groups: int, size: int, one_of: int) -> Work:
        """Operations of the losses of groups of so many experts, by one of so many neurons and numbers of a hidden state: of
        each, half of A and C on the tokens of all members, factor, inverse and rounds."""
        tokens = min(1.0, size * self.top_k / self.num_experts) * self.sampled
        columns = size * -(-min(COMPARED, self.neurons) // one_of)
        products = columns * (columns + 2 * self.hidden_size / one_of) * tokens
        return Work(num_groups * products, num_groups * 2.0 * columns**3)

    def solve_work(self, sweeps: int, num_ridges: int) -> Work:
        """Operations of one solution of all slots."""
        d, slots = self.hidden_size, [(self.kept, self.tokens)] * self.num_slots
        if self.shared:
            slots.append((self.shared, self.all_tokens))
        if self.is_joint:
            t, n = self.all_tokens, self.columns
            return Work(t * n * n + 2 * t * n * d + (num_ridges + 1) * 4 * n * n * d, (num_ridges + 1) * n**3 / 3)
        squares = sum(n * n for n, _ in slots)
        again = 1 if 2 * squares <= self.bounds.moment_values else sweeps  # factors that find no room are made again
        products = sum(again * t * n * n + 2 * t * n * d + sweeps * (4 * t * n * d + 2 * n * n * d) for n, t in slots)
        factors = again * sum(n**3 for n, _ in slots) / 3
        return Work(products + num_ridges * 4 * self.kept**2 * d, factors + num_ridges * self.kept**3 / 3)

    @property
    def router_work(self) -> Work:
        """Operations of the router's Gauss-Newton step: what the slots give, for the step and for what is left; products of
        slopes and inputs for each two rows; the factor; and what the slots give held-out tokens, under the rows before and
        after."""
        unknowns = self.router_unknowns
        if not unknowns:
            return Work(0, 0)
        t, d, s = self.all_tokens, self.hidden_size, self.num_slots
        outputs = 2 * s * self.tokens * self.kept * d
        products = (2 + 2 / HELD_OUT) * outputs + t * s * s * 2 * d + t * s * (s + 1) * d * d
        return Work(products, unknowns**3 / 3)

    @property
    def start_work(self) -> Work:
        """Operations of what the slots give: all tokens, and held-out ones under the plan's rows and under fitted ones."""
        outputs = 2.0 * self.num_slots * self.tokens * self.kept * self.hidden_size
        return Work(outputs * (1 + (2 / HELD_OUT if self.is_fitted else 0)), 0)

    def shared_flops(self, num_plans: int) -> float:
        """Operations that workers share: pairs and choices. num_plans: that are compared."""
        return sum(self.compare_work) + num_plans * self.num_slots * sum(self.choose_work)

    def alone_flops(self, num_plans: int) -> float:
        """Operations of one worker: groups of pairs, starts and solutions. num_plans: that are compared."""
        started = sum(self.start_work) if self.candidates else 0
        solved = sum(self.solve_work(SWEEPS, NUM_RIDGES)) + sum(self.router_work)
        return sum(self.groups_work) + num_plans * (started + solved)


def layer_needs(run: Run, target: Target) -> LayerNeeds:
    """Of the layer that keeps the fewest slots, which have the most members."""
    data, survey, fewest = run.config.calibration, run.survey, min(target.counts(run.survey).values())
    width = num_neurons(run.tensors)
    all_tokens = data.num_sequences * data.sequence_length
    kept = narrowed_to(run, target) or width
    chooses = target.variant.refit.neurons == "choose"
    bounds, num_all = Bounds.of(run.config.resources.worker_memory), -(-survey.num_experts // fewest) * width
    return LayerNeeds(
        num_slots=fewest,
        kept=kept,
        candidates=num_candidates(num_all, kept, bounds.choice_columns) if chooses else 0,
        wanted=num_candidates(num_all, kept, CHOICE_COLUMNS) if chooses else 0,
        tokens=min(all_tokens, all_tokens * survey.top_k // fewest),
        hidden_size=survey.hidden_size,
        all_tokens=all_tokens,
        itemsize=survey.itemsize,
        bounds=bounds,
        is_fitted=is_fitted(target),
        compares_pairs=pairs_of(run, target) is not None,
        num_experts=survey.num_experts,
        top_k=survey.top_k,
        neurons=width,
        shared=_shared_neurons(run) if target.variant.refit.shared_expert else 0,
        num_plans=1 + len(target.variant.method.alternatives_in(target.format)),
    )


def _shared_neurons(run: Run) -> int:
    """Neurons of the shared expert whose W_down can be solved; the most of any layer, 0 where there is none."""
    layers = set(run.survey.moe_layers)
    rows = [row for row in run.tensors if row.layer in layers and not row.scheme and _SHARED.search(row.parameter)]
    return max((row.values_shape[-1] for row in rows), default=0)


def worker_bytes(run: Run, target: Target) -> int:
    """Memory in bytes of a worker, at the step that takes the most."""
    needs = layer_needs(run, target)
    beside = max(needs.start_bytes, needs.choose_bytes if needs.candidates else 0, needs.solve_bytes)
    return max(layer_bytes(run, layer, beside) for layer in run.survey.moe_layers)


def layer_bytes(run: Run, layer: int, beside_bytes: int) -> int:
    """Memory in bytes of a worker that holds a layer and beside_bytes more. While it loads the layer, or sends a token shard
    through, it has nothing beside it."""
    layers = (layer, layer + 1)
    return max(held_bytes(run.survey, layers, run.config.calibration), weight_bytes(run.survey, layers) + beside_bytes)


def target_flops(run: Run, target: Target, num_plans: int | None = None) -> float:
    """Operations of all layers: both streams' ways through them, pairs, and starts, choices and solutions of each plan.
    num_plans: as many as are compared, by default."""
    needs, survey = layer_needs(run, target), run.survey
    plans = num_plans or needs.num_plans
    passing = pass_flops(survey, run.config.calibration, is_one_shot=target.variant.refit.mode == "one_shot")
    return passing + len(survey.moe_layers) * (needs.shared_flops(plans) + needs.alone_flops(plans))


def alone_flops(run: Run, target: Target) -> float:
    """Operations, of `target_flops`, that more workers do not make faster. None in one shot, where each worker has a layer of
    its own."""
    needs = layer_needs(run, target)
    is_one_shot = target.variant.refit.mode == "one_shot"
    return 0.0 if is_one_shot else len(run.survey.moe_layers) * needs.alone_flops(needs.num_plans)


def pass_flops(survey: Survey, data: Calibration, is_one_shot: bool) -> float:
    """Operations of both streams' ways through all layers: the source's with its experts, the student's without them and, where
    another layer follows, with them."""
    experts = sum(survey.layer_expert_bytes) / survey.itemsize * survey.top_k / survey.num_experts
    rest = sum(survey.layer_bytes) / survey.itemsize - sum(survey.layer_expert_bytes) / survey.itemsize
    ways_of_experts, ways_of_rest = (1, 2) if is_one_shot else (2, 3)
    return 2 * data.num_sequences * data.sequence_length * (ways_of_experts * experts + ways_of_rest * rest)


def disk_bytes(run: Run, target: Target) -> int:
    """Temporary disk space: two streams, each at two layer boundaries, what a layer's experts are given and have to give, how
    each plan routes, and what its slots have chosen. In one shot layers do not wait for each other, so all stay."""
    needs, survey = layer_needs(run, target), run.survey
    values = needs.all_tokens * needs.hidden_size
    given = values * (needs.itemsize + 4 + (needs.itemsize if needs.is_fitted else 0))
    chosen = needs.num_slots * needs.hidden_size * 4 * needs.kept
    routed = needs.all_tokens * needs.top_k * (8 + needs.itemsize)
    layer = given + (needs.num_plans * (routed + chosen) if needs.candidates else 0)
    if target.variant.refit.mode == "one_shot":
        return len(survey.moe_layers) * (layer + values * needs.itemsize)
    return layer + 4 * values * needs.itemsize
