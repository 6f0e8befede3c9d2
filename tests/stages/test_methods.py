"""Every method against a slow reference written from its formula, and what holds for all of them.

Dimensions: D hidden size, E experts.
"""

from collections.abc import Callable
from itertools import combinations, product
from typing import Any, get_args

import numpy as np
import pytest

from stages.cluster import linkage, matching
from stages.cluster.features import Feature
from stages.cluster.matching import lost
from stages.cluster.registry import methods
from stages.cluster.weights import COMBINATIONS
from stages.contracts import pairing
from stages.contracts.evidence import PAIRED_AXES, LayerEvidence
from stages.contracts.layer_plan import LayerPlan, Member
from stages.contracts.method import PlanSettings
from stages.contracts.settings import Export, Merging
from tests.conftest import REPOSITORY

NUM_EXPERTS, HIDDEN, NEURONS, TOKENS, SAMPLED = 12, 5, 64, 300, 20
METHODS = sorted(methods())
PRUNING = sorted(name for name, method in methods().items() if not method.reads_merging)
CLUSTERING = sorted(set(METHODS) - set(PRUNING))
FEATURES = list(get_args(Feature))
RULES = sorted(COMBINATIONS)
ROUTER_RULES = set(get_args(Export.model_fields["router"].annotation))
TREES = [
    (distance, one)
    for distance, one in product(linkage.DISTANCES, linkage.LINKAGES)
    if one != "ward" or distance == "euclidean"
]
VARIANTS = [
    *((name, {}) for name in METHODS),
    *(("hierarchical", {"feature": feature, "distance": "cosine"}) for feature in FEATURES),
    *(("hierarchical", {"feature": feature, "linkage": "complete"}) for feature in FEATURES[1:]),
    *((name, {"feature": feature}) for name in ("kmeans", "ream") for feature in FEATURES),
    *(("hierarchical", {"distance": distance, "linkage": one}) for distance, one in TREES),
    ("ean", {"statistic": "sum"}),
    ("ream", {"max_absorbed": 2}),
    ("o_prune", {"max_subsets": 50}),
]


def evidence_of(seed: int = 0, num_experts: int = NUM_EXPERTS) -> LayerEvidence:
    """Evidence of random router logits and outputs."""
    random = np.random.default_rng(seed)
    logits_TE = random.normal(size=(TOKENS, num_experts))
    scores_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    routed_TE = logits_TE >= np.sort(logits_TE, 1)[:, [-2]]
    scale_E, mean_ED = random.uniform(0.5, 2, num_experts), random.normal(size=(num_experts, HIDDEN))
    output_TED = mean_ED + random.normal(size=(TOKENS, num_experts, HIDDEN)) * scale_E[:, None]
    norm_TE = np.linalg.norm(output_TED, axis=2)
    gate_TE = scores_TE * routed_TE
    columns = {
        "num_routed_tokens": routed_TE.sum(0) * 100 + np.arange(num_experts),  # no two alike: those are chosen by number
        "gate_sum": gate_TE.sum(0),
        "gated_output_norm_sum": (gate_TE * norm_TE).sum(0),
        "output_norm_sum": (routed_TE * norm_TE).sum(0),
        "router_probability_sum": scores_TE.sum(0),
        "router_logit_gram": logits_TE.T @ logits_TE,
        "output_sum": output_TED.sum(0),
        "neuron_importance_sum": random.exponential(size=(num_experts, NEURONS)),
        "gated_output_sum": (gate_TE[..., None] * output_TED).sum(0),
        "output_gram": np.einsum("ted,tfd->ef", output_TED, output_TED),
        "sampled_output_gram": np.einsum("ned,nfd->enf", output_TED[:SAMPLED], output_TED[:SAMPLED]),
        "sampled_gates": gate_TE[:SAMPLED].T,
        "sampled_logits": logits_TE[:SAMPLED].T,
        "router_choice_bias": np.zeros(num_experts),
    }
    weight_EP = random.normal(size=(num_experts, 40)) * scale_E[:, None]
    columns["weight_gram"] = weight_EP @ weight_EP.T
    return LayerEvidence(3, TOKENS, TOKENS, num_experts, columns)


def renumbered(evidence: LayerEvidence, order: list[int]) -> LayerEvidence:
    """Expert i of the new numbering is expert order[i] of the old one."""
    columns = {name: values[order] for name, values in evidence.columns.items()}
    columns |= {name: values.take(order, PAIRED_AXES[name]) for name, values in columns.items() if name in PAIRED_AXES}
    return LayerEvidence(evidence.layer, evidence.num_tokens, evidence.num_output_tokens, len(order), columns)


def test_an_expert_of_zeros_costs_nothing() -> None:
    """Its partner keeps all of its neurons, whichever expert that is; two of them go before anything is lost."""
    evidence = evidence_of(6)
    importance_EF = evidence["neuron_importance_sum"]
    importance_EF[[2, 7]] = 0
    for num_slots, num_zero in ((NUM_EXPERTS - 1, 1), (NUM_EXPERTS - 2, 2)):
        pairs = [sorted(slot.experts) for slot in plan_of("pairs", evidence, num_slots).slots if len(slot.experts) > 1]
        assert len(pairs) == num_zero and all({2, 7} & set(pair) for pair in pairs)
        assert sum(lost(importance_EF, pair) for pair in pairs) == 0


def test_pairs_of_a_grouped_router_stay_in_their_groups() -> None:
    evidence = evidence_of(3)
    settings = PlanSettings(methods()["pairs"].settings.model_validate({"num_experts": [6]}), Merging(), "frequency", 3)
    found = methods()["pairs"].plan(evidence, 6, settings)
    size = NUM_EXPERTS // 3
    owners = [{expert // size for expert in slot.experts} for slot in found.slots]
    assert owners == [{0}, {0}, {1}, {1}, {2}, {2}], "in the order of the groups"
    for group in range(3):
        part = evidence_of(3)
        columns = {"neuron_importance_sum": part["neuron_importance_sum"][group * size : (group + 1) * size],
                   "num_routed_tokens": part["num_routed_tokens"][group * size : (group + 1) * size]}  # fmt: skip
        alone = plan_of("pairs", LayerEvidence(3, TOKENS, TOKENS, size, columns), 2)
        assert groups(alone) == {
            frozenset(expert - group * size for expert in slot.experts) for slot in found.slots[2 * group : 2 * group + 2]
        }


def plan_of(
    name: str, evidence: LayerEvidence, num_slots: int, settings: dict[str, Any] | None = None, rule: Any = "frequency"
) -> LayerPlan:
    """rule: of merges, and of router rows where there is one of that name."""
    method = methods()[name]
    chosen = method.settings.model_validate({"num_experts": [num_slots], "method": name, **(settings or {})})
    assert method.requires(chosen) <= set(evidence.columns)
    router = rule if rule in ROUTER_RULES else "frequency"
    return method.plan(evidence, num_slots, PlanSettings(chosen, Merging(method=rule), router))


def groups(plan: LayerPlan) -> set[frozenset[int]]:
    return {frozenset(slot.experts) for slot in plan.slots}


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_another_numbering_of_the_experts_gives_the_same_plan(name: str, settings: dict[str, Any], seed: int) -> None:
    evidence = evidence_of(seed)
    order = np.random.default_rng(seed + 100).permutation(NUM_EXPERTS).tolist()
    for num_slots in (2, 5, 9):
        found = plan_of(name, renumbered(evidence, order), num_slots, settings)
        due = plan_of(name, evidence, num_slots, settings)
        assert {frozenset(order[expert] for expert in group) for group in groups(found)} == groups(due)
        weights = {order[one.expert]: one.weight for slot in found.slots for one in slot.members}
        assert weights == pytest.approx({one.expert: one.weight for slot in due.slots for one in slot.members})


@pytest.mark.parametrize("rule", RULES)
def test_another_numbering_gives_the_same_weights_of_members_and_of_router_rows(rule: str) -> None:
    evidence, order = evidence_of(2), np.random.default_rng(1).permutation(NUM_EXPERTS).tolist()
    found, due = (plan_of("hierarchical", one, 4, rule=rule) for one in (renumbered(evidence, order), evidence))

    def weights(plan: LayerPlan, names: list[int]) -> dict[tuple[str, int], float]:
        members = {("member", names[one.expert]): one.weight for slot in plan.slots for one in slot.members}
        rows = [part for slot in plan.slots if slot.row is not None for part in slot.row.parts]
        assert len(plan.slots) == 4 < len({expert for expert, _ in rows}) or rule in ("dominant", "central")
        return {**members, **{("row", names[expert]): weight for expert, weight in rows}}

    assert weights(found, order) == pytest.approx(weights(due, list(range(NUM_EXPERTS))))


@pytest.mark.parametrize("rule", RULES)
def test_clusters_of_one_stay_as_they_are_by_every_rule(rule: str) -> None:
    for expert, slot in enumerate(plan_of("hierarchical", evidence_of(), NUM_EXPERTS, rule=rule).slots):
        assert slot.members == (Member(expert),) and slot.row is not None and slot.row.parts == ((expert, 1.0),)


@pytest.mark.parametrize("rule", RULES)
def test_copies_merge_into_themselves_by_every_rule(rule: str) -> None:
    """Each slot's weighted sum of its members' tensors, and of their router rows, is that of any of them."""
    half = evidence_of(3, NUM_EXPERTS // 2)
    twins = renumbered(half, [*range(NUM_EXPERTS // 2), *range(NUM_EXPERTS // 2)])
    values_E = np.tile(np.random.default_rng(0).normal(size=NUM_EXPERTS // 2), 2)
    plan = plan_of("hierarchical", twins, NUM_EXPERTS // 2, rule=rule)
    for slot in plan.slots:
        due = [pytest.approx(values_E[expert], rel=1e-12) for expert in slot.experts]
        assert slot.row is not None and len(due) == 2
        assert [sum(one.weight * values_E[one.expert] for one in slot.members)] * 2 == due
        assert [sum(weight * values_E[expert] for expert, weight in slot.row.parts)] * 2 == due


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_with_all_experts_every_one_stays_as_it_is(name: str, settings: dict[str, Any]) -> None:
    plan = plan_of(name, evidence_of(), NUM_EXPERTS, settings)
    for expert, slot in enumerate(plan.slots):
        assert slot.experts == (expert,) and slot.members == (Member(expert),)
        assert slot.row is not None and slot.row.parts == ((expert, 1.0),)


@pytest.mark.parametrize("name", METHODS)
def test_as_many_slots_as_were_asked_for_and_every_expert_in_one_or_dropped(name: str) -> None:
    for num_slots in range(NUM_EXPERTS if methods()[name].keeps_all else 1, NUM_EXPERTS + 1):
        plan = plan_of(name, evidence_of(7), num_slots)
        assert len(plan.slots) == num_slots
        placed = sorted(expert for slot in plan.slots for expert in slot.experts)
        assert len(placed) == num_slots if name in PRUNING else placed == list(range(NUM_EXPERTS))


@pytest.mark.parametrize(
    ("name", "settings"), [one for one in VARIANTS if one[0] in CLUSTERING and one[0] not in ("random", "pairs", "best")]
)
def test_experts_that_are_copies_of_each_other_share_a_slot(name: str, settings: dict[str, Any]) -> None:
    """Six pairs of equal experts into six slots."""
    half = evidence_of(3, NUM_EXPERTS // 2)
    twins = renumbered(half, [*range(NUM_EXPERTS // 2), *range(NUM_EXPERTS // 2)])
    if name in ("dominant", "ream"):  # their centres are the most used or salient, so a copy must be less so
        twins.columns["num_routed_tokens"][NUM_EXPERTS // 2 :] = 1  # type: ignore[index]
        twins.columns["gated_output_norm_sum"][NUM_EXPERTS // 2 :] = 0  # type: ignore[index]
    if name == "ream":
        settings = {**settings, "max_absorbed": 1}
    found = groups(plan_of(name, twins, NUM_EXPERTS // 2, settings))
    assert found == {frozenset({expert, expert + NUM_EXPERTS // 2}) for expert in range(NUM_EXPERTS // 2)}


@pytest.mark.parametrize("name", ["f_prune", "reap", "ean"])
def test_an_expert_that_is_never_routed_to_is_the_first_to_go(name: str) -> None:
    evidence = evidence_of(4)
    for column in ("num_routed_tokens", "gate_sum", "gated_output_norm_sum", "output_norm_sum"):
        evidence.columns[column][6] = 0
    assert groups(plan_of(name, evidence, NUM_EXPERTS - 1)) == {frozenset({e}) for e in range(NUM_EXPERTS) if e != 6}


SCORES: dict[str, Callable[[LayerEvidence, int], float]] = {
    "f_prune": lambda e, i: e["num_routed_tokens"][i],
    "s_prune": lambda e, i: e["router_probability_sum"][i] / e.num_tokens,
    "reap": lambda e, i: e["gated_output_norm_sum"][i] / e["num_routed_tokens"][i],
    "ean": lambda e, i: e["output_norm_sum"][i] / e["num_routed_tokens"][i],
}


@pytest.mark.parametrize("num_slots", [9, 6, 4])
def test_survivors_adopt_dropped_experts_in_equal_shares(num_slots: int) -> None:
    """The survivors and rows are REAP's; of the dropped ones, each survivor in turn takes those most like it."""
    evidence = evidence_of(5)
    found, reap = plan_of("adopt", evidence, num_slots), plan_of("reap", evidence, num_slots)
    assert [(slot.experts, slot.row, slot.members[0]) for slot in found.slots] == [
        (slot.experts, slot.row, slot.members[0]) for slot in reap.slots
    ]
    gram_EE = evidence["router_logit_gram"]
    saliency = [SCORES["reap"](evidence, expert) for expert in range(NUM_EXPERTS)]
    survivors = sorted((slot.experts[0] for slot in reap.slots), key=lambda expert: -saliency[expert])
    free = set(range(NUM_EXPERTS)) - set(survivors)
    due: dict[int, set[int]] = {}
    for one in survivors:
        by_likeness = sorted(free, key=lambda other: -gram_EE[one, other] / gram_EE[other, other] ** 0.5)
        due[one] = set(by_likeness[: -(-(NUM_EXPERTS - num_slots) // num_slots)])
        free -= due[one]
    assert {slot.experts[0]: {member.expert for member in slot.members[1:]} for slot in found.slots} == due
    assert all(member.weight == 0 for slot in found.slots for member in slot.members[1:])


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("seed", range(3))
def test_a_pruning_rule_keeps_the_experts_with_the_largest_scores(name: str, seed: int) -> None:
    evidence = evidence_of(seed)
    ranked = sorted(range(NUM_EXPERTS), key=lambda expert: -SCORES[name](evidence, expert))
    plan = plan_of(name, evidence, 5)
    assert [slot.experts[0] for slot in plan.slots] == sorted(ranked[:5])
    assert plan.slot_E[ranked[5:]].tolist() == [-1] * 7


@pytest.mark.parametrize("seed", range(3))
def test_m_smoe_joins_each_expert_to_the_most_similar_of_the_most_used(seed: int) -> None:
    evidence = evidence_of(seed)
    gram = evidence["router_logit_gram"]
    centers = sorted(range(NUM_EXPERTS), key=lambda expert: -evidence["num_routed_tokens"][expert])[:4]
    due: dict[int, set[int]] = {center: {center} for center in centers}
    for expert in set(range(NUM_EXPERTS)) - set(centers):
        cosine = {center: gram[expert, center] / np.sqrt(gram[expert, expert] * gram[center, center]) for center in centers}
        due[max(cosine, key=lambda center: cosine[center])].add(expert)
    assert groups(plan_of("dominant", evidence, 4)) == {frozenset(group) for group in due.values()}


def test_ream_lets_the_most_salient_choose_first_and_only_so_many() -> None:
    evidence = evidence_of(5)
    feature = evidence["gated_output_sum"] / evidence["gate_sum"][:, None]
    unit = feature / np.linalg.norm(feature, axis=1, keepdims=True)
    scores = evidence["gated_output_norm_sum"] / evidence["num_routed_tokens"]
    centers = np.argsort(-scores)[:4].tolist()
    free, due = set(range(NUM_EXPERTS)) - set(centers), {center: {center} for center in centers}
    for center in centers:
        for expert in sorted(free, key=lambda one: -unit[one] @ unit[center])[:3]:
            due[center].add(expert)
            free.remove(expert)
    assert not free
    assert groups(plan_of("ream", evidence, 4, {"max_absorbed": 3})) == {frozenset(group) for group in due.values()}


@pytest.mark.parametrize("feature", FEATURES)
def test_k_means_ends_where_no_expert_is_nearer_to_another_centre(feature: str) -> None:
    evidence = evidence_of(6)
    vectors = {
        "expert_output": evidence["output_sum"] / TOKENS,
        "router_logits": np.linalg.cholesky(evidence["router_logit_gram"]),
        "gated_output": evidence["gated_output_sum"] / evidence["gate_sum"][:, None],
        "weight": np.linalg.cholesky(evidence["weight_gram"]),
        "token_wise": np.linalg.cholesky(evidence["output_gram"] / TOKENS),
    }[feature]
    slot_E = plan_of("kmeans", evidence, 4, {"feature": feature}).slot_E
    centers = np.stack([vectors[slot_E == slot].mean(0) for slot in range(4)])
    distance = np.linalg.norm(vectors[:, None] - centers[None], axis=2)
    assert (distance[np.arange(NUM_EXPERTS), slot_E] <= distance.min(1) + 1e-9).all()


@pytest.mark.parametrize(
    ("feature", "column", "divisor"), [("weight", "weight_gram", 1), ("token_wise", "output_gram", TOKENS)]
)
def test_features_have_the_distances_of_what_was_multiplied(feature: str, column: str, divisor: int) -> None:
    """||w_i - w_j||^2, and the mean over tokens of ||E_i(x) - E_j(x)||^2, to the first merge of the dendrogram."""
    evidence = evidence_of(9)
    gram = evidence[column] / divisor
    square = np.array([[gram[i, i] + gram[j, j] - 2 * gram[i, j] for j in range(NUM_EXPERTS)] for i in range(NUM_EXPERTS)])
    feature_ED = linkage.FEATURES[feature](evidence)
    found = np.square(feature_ED[:, None] - feature_ED[None]).sum(-1)
    np.testing.assert_allclose(found, square, atol=1e-9 * square.max())
    pair = min(combinations(range(NUM_EXPERTS), 2), key=lambda one: square[one])
    groups_of_two = [group for group in groups(plan_of("hierarchical", evidence, NUM_EXPERTS - 1, {"feature": feature}))
                     if len(group) == 2]  # fmt: skip
    assert groups_of_two == [frozenset(pair)]


def test_k_means_fills_clusters_that_equal_experts_leave_empty() -> None:
    evidence = evidence_of(1, 3)
    same = renumbered(evidence, [0] * 6 + [1, 2])
    plan = plan_of("kmeans", same, 5)
    assert len(plan.slots) == 5 and all(slot.experts for slot in plan.slots)


@pytest.mark.parametrize("name", ["random", "random_prune", "kmeans"])
def test_a_seed_gives_the_same_plan_again_and_another_one_gives_others(name: str) -> None:
    evidence = evidence_of()
    plans = [plan_of(name, evidence, 4, {"seed": seed}) for seed in range(8)]
    assert plans[0] == plan_of(name, evidence, 4, {"seed": 0})
    assert len({frozenset(groups(plan)) for plan in plans}) > 1


@pytest.mark.parametrize(("num_experts", "num_slots"), [(6, 5), (6, 4), (6, 3), (5, 3)])
def test_pairs_have_the_least_total_loss_of_all_disjoint_pairs(num_experts: int, num_slots: int) -> None:
    evidence = evidence_of(2, num_experts)
    importance = evidence["neuron_importance_sum"]

    def loss(pairs: tuple[tuple[int, int], ...]) -> float:
        return sum(np.sort(importance[list(pair)].reshape(-1))[:NEURONS].sum() for pair in pairs)

    disjoint = [
        pairs for pairs in combinations(combinations(range(num_experts), 2), num_experts - num_slots)
        if len({expert for pair in pairs for expert in pair}) == 2 * len(pairs)
    ]  # fmt: skip
    best = min(disjoint, key=loss)
    found = groups(plan_of("pairs", evidence, num_slots))
    assert {group for group in found if len(group) > 1} == {frozenset(pair) for pair in best}


def test_many_experts_are_paired_greedily_at_a_total_loss_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    importance = evidence_of(8)["neuron_importance_sum"]

    def total(labels: np.ndarray) -> float:
        return sum(matching.lost(importance, np.flatnonzero(labels == label).tolist()) for label in range(6))

    exact = total(matching.paired(importance, 6))
    monkeypatch.setattr(pairing, "EXACT_EXPERTS", 0)
    assert exact <= total(matching.paired(importance, 6)) < 1.3 * exact


def test_random_groups_are_equally_large() -> None:
    assert sorted(len(slot.experts) for slot in plan_of("random", evidence_of(), 5).slots) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_is_from_and_what_it_cannot_do(name: str) -> None:
    method = methods()[name]
    assert method.source and method.limits.endswith(".") and method.title
    assert method.presets and all(
        preset.keys() <= {"clustering", "budget", "merging", "refit", "export"} for preset in method.presets.values()
    )


def test_the_page_of_methods_lists_all_presets_with_their_methods_and_formats() -> None:
    lines = (REPOSITORY / "docs" / "methods.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `") and line.count("`") >= 4]
    listed = {preset.strip(" `"): (method.strip(" `"), formats.strip()) for _, preset, method, _, _, formats, _ in rows}
    known = {
        name: (method.name, ", ".join(preset.get("export", {}).get("formats", method.formats)))  # type: ignore[arg-type]
        for method in methods().values()
        for name, preset in method.presets.items()
    }
    assert listed == known
