"""Weights of experts in the expert that their cluster becomes, and of router rows in a combined row."""

import numpy as np
import pytest

from stages.cluster.weights import ROUTERS, WEIGHTS, cluster_weights
from stages.contracts.evidence import LayerEvidence

LABELS_E = np.array([0, 1, 0, 2, 1, 1])
USED_E = np.array([3, 0, 9, 5, 2, 6])


def statistics(num_routed_E: np.ndarray) -> LayerEvidence:
    return LayerEvidence(0, 100, 100, len(num_routed_E), {"num_routed_tokens": num_routed_E})


def test_frequency_weights_are_usage_over_the_usage_of_the_cluster() -> None:
    weights, unweighted = cluster_weights(WEIGHTS["frequency"](statistics(USED_E)), LABELS_E)
    assert weights == [[(0, 0.25), (2, 0.75)], [(1, 0.0), (4, 0.25), (5, 0.75)], [(3, 1.0)]]
    assert unweighted == []


def test_average_weights_are_equal_whatever_the_usage() -> None:
    weights, unweighted = cluster_weights(WEIGHTS["average"](statistics(USED_E)), LABELS_E)
    assert weights == [[(0, 0.5), (2, 0.5)], [(1, 1 / 3), (4, 1 / 3), (5, 1 / 3)], [(3, 1.0)]]
    assert unweighted == []


def test_a_cluster_never_routed_to_gets_equal_weights_and_is_reported() -> None:
    """The reference code yields zero weights here."""
    weights, unweighted = cluster_weights(WEIGHTS["frequency"](statistics(np.array([3, 0, 9, 0, 0, 0]))), LABELS_E)
    assert weights[1] == [(1, 1 / 3), (4, 1 / 3), (5, 1 / 3)]
    assert weights[2] == [(3, 1.0)]
    assert unweighted == [1, 2]


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("seed", range(4))
def test_weights_of_a_cluster_sum_to_one_and_its_members_ascend(method: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels_E = np.concatenate([np.arange(5), random.integers(0, 5, 20)])
    weights, _ = cluster_weights(WEIGHTS[method](statistics(random.integers(0, 1000, 25))), labels_E)
    assert sorted(member for cluster in weights for member, _ in cluster) == list(range(25))
    for label, cluster in enumerate(weights):
        members = [member for member, _ in cluster]
        assert members == sorted(members)
        assert {labels_E[member] for member in members} == {label}
        assert sum(share for _, share in cluster) == pytest.approx(1, abs=1e-12)


def test_router_rules_weigh_rows_by_usage_equally_or_take_the_most_used() -> None:
    rows = {rule: ROUTERS[rule](statistics(USED_E), LABELS_E) for rule in ROUTERS}
    assert rows == {
        "frequency": [[(0, 0.25), (2, 0.75)], [(1, 0.0), (4, 0.25), (5, 0.75)], [(3, 1.0)]],
        "average": [[(0, 0.5), (2, 0.5)], [(1, 1 / 3), (4, 1 / 3), (5, 1 / 3)], [(3, 1.0)]],
        "dominant": [[(2, 1.0)], [(5, 1.0)], [(3, 1.0)]],
    }


def test_of_equally_used_experts_the_first_is_dominant() -> None:
    assert ROUTERS["dominant"](statistics(np.array([4, 7, 4, 0, 7, 7])), LABELS_E) == [[(0, 1.0)], [(1, 1.0)], [(3, 1.0)]]
