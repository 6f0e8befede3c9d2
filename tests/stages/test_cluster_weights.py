"""Weights of experts in the expert that their cluster becomes, and of router rows in a combined row."""

import numpy as np
import pytest

from stages.cluster.weights import COMBINATIONS, unweighted_clusters
from stages.contracts.evidence import LayerEvidence

LABELS_E = np.array([0, 1, 0, 2, 1, 1])
USED_E = np.array([3, 0, 9, 5, 2, 6])


def evidence_of(num_routed_E: np.ndarray) -> LayerEvidence:
    """What a token adds is ten times its expert's number, and so is the first component of the mean output."""
    tens_E = np.arange(len(num_routed_E)) * 10.0
    columns = {
        "num_routed_tokens": num_routed_E,
        "gated_output_norm_sum": num_routed_E * tens_E,
        "output_sum": np.stack([100 * tens_E, np.ones(len(tens_E))], axis=1),
    }
    return LayerEvidence(0, 100, 100, len(num_routed_E), columns)


@pytest.mark.parametrize(
    ("rule", "weights"),
    {
        "frequency": [[(0, 0.25), (2, 0.75)], [(1, 0.0), (4, 0.25), (5, 0.75)], [(3, 1.0)]],
        "average": [[(0, 0.5), (2, 0.5)], [(1, 1 / 3), (4, 1 / 3), (5, 1 / 3)], [(3, 1.0)]],
        "saliency": [[(0, 0.0), (2, 1.0)], [(1, 0.0), (4, 40 / 90), (5, 50 / 90)], [(3, 1.0)]],
        "dominant": [[(2, 1.0)], [(5, 1.0)], [(3, 1.0)]],
        "central": [[(2, 1.0)], [(4, 1.0)], [(3, 1.0)]],  # two are equally central, of three the one in the middle
    }.items(),
)
def test_rules_weigh_by_use_equally_by_saliency_or_take_the_most_used(rule: str, weights: object) -> None:
    assert COMBINATIONS[rule](evidence_of(USED_E), LABELS_E) == weights
    assert unweighted_clusters(evidence_of(USED_E), LABELS_E, rule) == set()


@pytest.mark.parametrize("rule", ["frequency", "saliency"])
def test_a_cluster_never_routed_to_gets_equal_weights_and_is_reported(rule: str) -> None:
    """The reference code yields zero weights here."""
    evidence = evidence_of(np.array([3, 0, 9, 0, 0, 0]))
    weights = COMBINATIONS[rule](evidence, LABELS_E)
    assert weights[1] == [(1, 1 / 3), (4, 1 / 3), (5, 1 / 3)]
    assert weights[2] == [(3, 1.0)]
    assert unweighted_clusters(evidence, LABELS_E, rule) == {1, 2}
    assert unweighted_clusters(evidence, LABELS_E, "average") == unweighted_clusters(evidence, LABELS_E, "central") == set()


@pytest.mark.parametrize("rule", COMBINATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_weights_of_a_cluster_sum_to_one_and_its_members_ascend(rule: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels_E = np.concatenate([np.arange(5), random.integers(0, 5, 20)])
    weights = COMBINATIONS[rule](evidence_of(random.integers(0, 1000, 25)), labels_E)
    for label, cluster in enumerate(weights):
        members = [member for member, _ in cluster]
        assert members == sorted(members)
        assert {labels_E[member] for member in members} == {label}
        assert sum(weight for _, weight in cluster) == pytest.approx(1, abs=1e-12)


def test_of_equally_used_experts_the_first_is_dominant() -> None:
    evidence = evidence_of(np.array([4, 7, 4, 0, 7, 7]))
    assert COMBINATIONS["dominant"](evidence, LABELS_E) == [[(0, 1.0)], [(1, 1.0)], [(3, 1.0)]]
