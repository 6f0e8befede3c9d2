"""Super experts are found by the rule, and no method merges or drops them.

Dimensions: L layers, E experts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.cluster.protection import planned, super_experts
from stages.cluster.registry import methods
from stages.contracts.errors import InputError
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan, Member
from stages.contracts.method import PlanSettings
from stages.contracts.protection import read_protected, write_protected
from stages.contracts.settings import Merging
from tests.stages.test_methods import CLUSTERING, METHODS, NUM_EXPERTS, PRUNING, VARIANTS, evidence_of, renumbered

PROTECTED = (1, 6, 9)


def plan_with(
    name: str, evidence: LayerEvidence, num_slots: int, protected: tuple[int, ...], settings: dict[str, Any] | None = None
) -> LayerPlan:
    method = methods()[name]
    chosen = method.settings.model_validate({"num_experts": [num_slots], "method": name, **(settings or {})})
    return planned(method, evidence, num_slots, PlanSettings(chosen, Merging(), "frequency", protected=protected))


@pytest.mark.parametrize("seed", range(5))
def test_super_experts_are_above_the_percentile_and_a_tenth_of_the_largest_in_early_layers(seed: int) -> None:
    random = np.random.default_rng(seed)
    largest_LE = random.exponential(size=(12, 64)) ** 3
    ranked = sorted(largest_LE.ravel())
    place = 0.995 * (len(ranked) - 1)
    low = int(place)
    percentile = ranked[low] + (place - low) * (ranked[low + 1] - ranked[low])
    due = {
        (layer, expert)
        for layer in range(9)
        for expert in range(64)
        if largest_LE[layer, expert] > percentile and largest_LE[layer, expert] > max(ranked) / 10
    }
    assert {tuple(one) for one in np.argwhere(super_experts(largest_LE)).tolist()} == due


def test_one_outlier_hides_others_that_are_ten_times_smaller() -> None:
    largest_LE = np.ones((4, 300))
    largest_LE[0, 3], largest_LE[1, 5], largest_LE[2, 7], largest_LE[3, 9] = 500, 60, 40, 400
    assert np.argwhere(super_experts(largest_LE)).tolist() == [[0, 3], [1, 5]], "layer 3 is in the last quarter"
    assert not super_experts(np.ones((4, 8))).any()


@pytest.mark.parametrize(("name", "settings"), [one for one in VARIANTS if not methods()[one[0]].keeps_all])
def test_no_method_merges_or_drops_a_protected_expert(name: str, settings: dict[str, Any]) -> None:
    for num_slots in range(4, NUM_EXPERTS + 1):
        plan = plan_with(name, evidence_of(2), num_slots, PROTECTED, settings)
        assert len(plan.slots) == num_slots
        slots = {slot.experts: slot for slot in plan.slots}
        for expert in PROTECTED:
            assert slots[(expert,)].members == (Member(expert),)
            row = slots[(expert,)].row
            assert row is not None and row.parts == ((expert, 1.0),)
        placed = sorted(expert for slot in plan.slots for expert in slot.experts)
        assert len(placed) == num_slots if name in PRUNING else placed == list(range(NUM_EXPERTS))
        firsts = [min(slot.experts) for slot in plan.slots]
        assert firsts == sorted(firsts)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "o_prune"])
def test_the_others_are_planned_as_if_there_were_no_protected_ones(name: str) -> None:
    evidence = evidence_of(2)
    others = [expert for expert in range(NUM_EXPERTS) if expert not in PROTECTED]
    alone = plan_with(name, renumbered(evidence, others), 4, ())
    due = {tuple(others[expert] for expert in slot.experts) for slot in alone.slots}
    assert {slot.experts for slot in plan_with(name, evidence, 7, PROTECTED).slots} == due | {(one,) for one in PROTECTED}


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_another_numbering_gives_the_same_plan(name: str, settings: dict[str, Any]) -> None:
    evidence, order = evidence_of(3), np.random.default_rng(1).permutation(NUM_EXPERTS).tolist()
    moved = tuple(sorted(order.index(expert) for expert in PROTECTED))
    found = plan_with(name, renumbered(evidence, order), 6, moved, settings)
    due = plan_with(name, evidence, 6, PROTECTED, settings)
    assert {frozenset(order[e] for e in slot.experts) for slot in found.slots} == {frozenset(s.experts) for s in due.slots}


@pytest.mark.parametrize("name", CLUSTERING)
def test_slots_that_the_protected_ones_fill_are_one_line(name: str) -> None:
    with pytest.raises(InputError) as refused:
        plan_with(name, evidence_of(), 3, PROTECTED)
    assert str(refused.value) == (
        "layer 3: clustering.protect is super and 3 of its 12 experts are super experts, which leaves 0 of 3 slots to the "
        "others; raise clustering.num_experts, or set protect to none"
    )


@pytest.mark.parametrize("name", [name for name in PRUNING if not methods()[name].keeps_all])
def test_pruning_may_leave_the_protected_ones_alone_but_no_fewer(name: str) -> None:
    assert {slot.experts for slot in plan_with(name, evidence_of(), 3, PROTECTED).slots} == {(one,) for one in PROTECTED}
    with pytest.raises(InputError, match=r"layer 3: clustering\.protect is super and 3 .* raise clustering\.num_experts"):
        plan_with(name, evidence_of(), 2, PROTECTED)


def test_protected_experts_are_read_back(tmp_path: Path) -> None:
    write_protected(tmp_path / "p.arrow", {4: (0, 7), 2: (5,), 3: ()})
    assert read_protected(tmp_path / "p.arrow") == {2: (5,), 4: (0, 7)}
    write_protected(tmp_path / "none.arrow", {})
    assert read_protected(tmp_path / "none.arrow") == {}
