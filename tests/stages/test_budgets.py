"""Budgets over layers against slow references: every distribution tried, every merge of all layers in order of height.

Dimensions: L layers, E experts, N sampled tokens, D hidden size.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stages.cluster.allocation import allocate
from stages.cluster.budgets.registry import budgets
from stages.cluster.protection import planned
from stages.cluster.registry import methods
from stages.cluster.spec import Bounds
from stages.contracts.budget import LayerCosts, Planner
from stages.contracts.errors import InputError
from stages.contracts.evidence import LayerEvidence
from stages.contracts.method import PlanSettings
from stages.contracts.settings import Merging
from tests.stages.test_methods import NUM_EXPERTS, evidence_of, renumbered

KINDS = sorted(name for name, kind in budgets().items() if kind.costs is not None)
LAYERS = 3


def planner_of(evidence: LayerEvidence, name: str = "hierarchical", protected: Sequence[int] = ()) -> Planner:
    method = methods()[name]
    chosen = method.settings.model_validate({"num_experts": [1], "method": name})
    settings: PlanSettings[Any] = PlanSettings(chosen, Merging(), None, protected=tuple(protected))
    return Planner(evidence, method, settings, lambda count: planned(method, evidence, count, settings))


def costs_of(kind: str, planner: Planner, counts: Sequence[int]) -> LayerCosts:
    costs = budgets()[kind].costs
    assert costs is not None
    return LayerCosts(tuple(counts), costs(planner, counts))


def distributed(kind: str, layers: Sequence[LayerEvidence], mean: int, least: int = 1, multiple_of: int = 1) -> list[int]:
    counts = Bounds(least, multiple_of).choices(layers[0].num_experts)
    return allocate([costs_of(kind, planner_of(layer), counts) for layer in layers], mean * len(layers), "it")


@pytest.fixture
def layers() -> list[LayerEvidence]:
    return [evidence_of(seed) for seed in range(LAYERS)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_distribution_costs_less(seed: int) -> None:
    """Costs of any shape, and layers with different numbers to choose from."""
    random = np.random.default_rng(seed)
    choices = [sorted(random.choice(np.arange(1, 9), size=random.integers(2, 7), replace=False).tolist()) for _ in range(4)]
    layers = [LayerCosts(tuple(counts), random.normal(size=len(counts))) for counts in choices]
    sums: dict[int, float] = {}
    for picked in itertools.product(*(range(len(counts)) for counts in choices)):
        total = sum(counts[one] for counts, one in zip(choices, picked, strict=True))
        cost = sum(float(layer.costs_N[one]) for layer, one in zip(layers, picked, strict=True))
        sums[total] = min(cost, sums.get(total, np.inf))
    for total, least in sums.items():
        found = allocate(layers, total, "it")
        assert sum(found) == total
        cost = sum(float(layer.costs_N[layer.num_slots.index(one)]) for layer, one in zip(layers, found, strict=True))
        assert cost == pytest.approx(least)


def test_a_total_that_no_distribution_has_is_one_line() -> None:
    layer = LayerCosts((2, 4), np.zeros(2))
    with pytest.raises(InputError) as refused:
        allocate([layer, layer], 5, "far-3e-tied")
    assert str(refused.value) == (
        "far-3e-tied: the layers may keep 4 to 8 experts in all, in steps of budget.multiple_of, and clustering.num_experts "
        "asks for 5; change num_experts, budget.least or budget.multiple_of"
    )


@pytest.mark.parametrize("mean", [5, 6, 10])
def test_one_threshold_of_use_parts_the_experts_of_all_layers(layers: list[LayerEvidence], mean: int) -> None:
    layers[0].columns["num_routed_tokens"][::2] //= 3
    used = sorted(((int(u), layer) for layer, one in enumerate(layers) for u in one["num_routed_tokens"]), reverse=True)
    due = [sum(layer == number for _, layer in used[: mean * LAYERS]) for number in range(LAYERS)]
    assert distributed("usage", layers, mean) == due and len(set(due)) > 1


def test_a_layer_keeps_its_least_where_the_threshold_leaves_it_less(layers: list[LayerEvidence]) -> None:
    layers[1].columns["num_routed_tokens"][:] //= 1000
    assert distributed("usage", layers, 6, least=4)[1] == 4
    assert distributed("usage", layers, 6)[1] == 1, "otherwise a layer keeps one at least"


@pytest.mark.parametrize("mean", [3, 6, 10])
def test_the_lowest_merges_of_all_layers_are_taken(layers: list[LayerEvidence], mean: int) -> None:
    layers[0].columns["output_sum"][:] *= 0.9
    linkage = methods()["hierarchical"].linkage
    assert linkage is not None
    merges = []
    for number, layer in enumerate(layers):
        merges += [(float(height), number) for height in linkage(layer, planner_of(layer).settings.clustering)[:, 2]]
    taken = [number for _, number in sorted(merges)[: (NUM_EXPERTS - mean) * LAYERS]]
    due = [NUM_EXPERTS - taken.count(number) for number in range(LAYERS)]
    assert distributed("heights", layers, mean) == due and len(set(due)) > 1


@pytest.mark.parametrize("name", ["hierarchical", "dominant", "ream", "random"])
def test_the_error_is_that_of_outputs_made_one_by_one(name: str) -> None:
    """The layer's output before and after, token by token, where a merged expert gives the weighted mean of its members."""
    random = np.random.default_rng(5)
    evidence = evidence_of(3)
    output_NED = random.normal(size=(9, NUM_EXPERTS, 4))
    gate_NE = random.random((9, NUM_EXPERTS)) * (random.random((9, NUM_EXPERTS)) < 0.3)
    evidence.columns["sampled_output_gram"] = np.einsum("ned,nfd->enf", output_NED, output_NED)  # type: ignore[index]
    evidence.columns["sampled_gates"] = gate_NE.T  # type: ignore[index]
    planner = planner_of(evidence, name)
    for count in (1, 4, 11):
        due = 0.0
        for token in range(9):
            before = sum(gate_NE[token, expert] * output_NED[token, expert] for expert in range(NUM_EXPERTS))
            after = np.zeros(4)
            for slot in planner.plan(count).slots:
                merged = sum(member.weight * output_NED[token, member.expert] for member in slot.members)
                after += sum(gate_NE[token, expert] for expert in slot.experts) * merged
            due += float(((after - before) ** 2).sum())
        assert costs_of("error", planner, [count]).costs_N[0] == pytest.approx(due)


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_kept_at_no_cost(kind: str, layers: list[LayerEvidence]) -> None:
    assert distributed(kind, layers, NUM_EXPERTS) == [NUM_EXPERTS] * LAYERS
    assert costs_of(kind, planner_of(layers[0]), [NUM_EXPERTS]).costs_N[0] == pytest.approx(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protected", [(), (2, 7)])
def test_another_numbering_of_the_experts_costs_the_same(kind: str, protected: tuple[int, ...]) -> None:
    evidence, order = evidence_of(4), np.random.default_rng(9).permutation(NUM_EXPERTS).tolist()
    moved = [order.index(expert) for expert in protected]
    counts = range(3, NUM_EXPERTS + 1)
    one = costs_of(kind, planner_of(evidence, protected=protected), counts)
    other = costs_of(kind, planner_of(renumbered(evidence, order), protected=moved), counts)
    np.testing.assert_allclose(one.costs_N, other.costs_N, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["heights", "error"])
def test_copies_are_merged_before_anything_else(kind: str, layers: list[LayerEvidence]) -> None:
    half = NUM_EXPERTS // 2
    layers[1] = renumbered(evidence_of(1, half), [*range(half), *range(half)])
    assert distributed(kind, layers, 10)[1] == half
    assert costs_of(kind, planner_of(layers[1]), [half]).costs_N[0] == pytest.approx(0, abs=1e-9)


def test_experts_that_are_never_used_go_first_and_cost_nothing(layers: list[LayerEvidence]) -> None:
    layers[2].columns["num_routed_tokens"][[1, 4, 5, 8, 9, 11]] = 0
    assert distributed("usage", layers, 10) == [NUM_EXPERTS, NUM_EXPERTS, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_multiples_and_no_less_than_the_least(kind: str, layers: list[LayerEvidence]) -> None:
    found = distributed(kind, layers, 8, least=3, multiple_of=4)
    assert sum(found) == 24 and set(found) <= {4, 8, 12}


@pytest.mark.parametrize("kind", KINDS)
def test_protected_experts_cost_nothing_by_themselves(kind: str) -> None:
    """With all but two protected, only those two can be merged."""
    evidence, protected = evidence_of(6), tuple(range(NUM_EXPERTS - 2))
    costs = costs_of(kind, planner_of(evidence, protected=protected), [NUM_EXPERTS - 1, NUM_EXPERTS])
    assert costs.costs_N[0] > 0 and costs.costs_N[1] == pytest.approx(0)
    least_used = min(evidence["num_routed_tokens"][-2:])
    assert kind != "usage" or costs.costs_N[0] == least_used


@pytest.mark.parametrize("name", sorted(budgets()))
def test_a_budget_says_where_it_is_from_and_what_it_cannot_do(name: str) -> None:
    kind = budgets()[name]
    assert kind.name == name and kind.source and kind.title and kind.limits.endswith(".")
