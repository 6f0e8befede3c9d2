"""Dendrograms and their cuts.

Dimensions: E experts, D feature size, K clusters.
"""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.cluster import hierarchy

from stages.cluster.linkage import link
from stages.contracts.arrow import read_table
from stages.contracts.dendrogram import all_cuts, cut, read_labels, write_labels
from stages.contracts.errors import InputError

NUM_EXPERTS = 9


def features(seed: int, num_experts: int = NUM_EXPERTS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_experts, 5))


def partition(labels_E: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels_E == label).tolist()) for label in set(labels_E.tolist())}


def _ward(feature_ED: np.ndarray, a: set[int], b: set[int]) -> float:
    """Growth of the summed squared distances to the centroid."""

    def spread(members: set[int]) -> float:
        rows = feature_ED[sorted(members)]
        return float(((rows - rows.mean(0)) ** 2).sum())

    return spread(a | b) - spread(a) - spread(b)


def _pairs(feature_ED: np.ndarray, a: set[int], b: set[int]) -> list[float]:
    return [float(np.linalg.norm(feature_ED[i] - feature_ED[j])) for i in a for j in b]


NAIVE: dict[str, Callable[[np.ndarray, set[int], set[int]], float]] = {
    "average": lambda feature_ED, a, b: float(np.mean(_pairs(feature_ED, a, b))),
    "single": lambda feature_ED, a, b: min(_pairs(feature_ED, a, b)),
    "complete": lambda feature_ED, a, b: max(_pairs(feature_ED, a, b)),
    "ward": _ward,
}


def agglomerate(feature_ED: np.ndarray, linkage: str, num_clusters: int) -> set[frozenset[int]]:
    """Merge the closest two clusters until num_clusters are left, straight from the definition."""
    clusters = [{expert} for expert in range(len(feature_ED))]
    while len(clusters) > num_clusters:
        a, b = min(combinations(clusters, 2), key=lambda pair: NAIVE[linkage](feature_ED, *pair))
        clusters = [c for c in clusters if c is not a and c is not b] + [a | b]
    return {frozenset(cluster) for cluster in clusters}


@pytest.mark.parametrize("linkage", NAIVE)
@pytest.mark.parametrize("seed", range(3))
def test_every_cut_is_what_the_definition_of_the_linkage_gives(linkage: str, seed: int) -> None:
    feature_ED = features(seed)
    linkage_Z = link(feature_ED, "euclidean", linkage, "here")
    for num_clusters in range(1, NUM_EXPERTS + 1):
        assert partition(cut(linkage_Z, num_clusters)) == agglomerate(feature_ED, linkage, num_clusters)


def test_the_linkages_differ_on_these_features() -> None:
    for one, other in combinations(NAIVE, 2):
        cuts = [
            (agglomerate(features(seed), one, k), agglomerate(features(seed), other, k)) for seed in range(3) for k in (3, 4)
        ]
        assert any(a != b for a, b in cuts), (one, other)


@pytest.mark.parametrize("linkage", NAIVE)
def test_the_dendrogram_and_its_cuts_are_scipys_where_no_distances_tie(linkage: str) -> None:
    feature_ED = features(seed=5, num_experts=30)
    ours_Z = link(feature_ED, "euclidean", linkage, "here")
    np.testing.assert_array_equal(ours_Z, hierarchy.linkage(feature_ED, method=linkage, metric="euclidean"))
    for num_clusters in range(1, 31):
        scipys = hierarchy.fcluster(ours_Z, num_clusters, criterion="maxclust")
        assert partition(cut(ours_Z, num_clusters)) == partition(scipys)


@pytest.mark.parametrize("linkage", NAIVE)
def test_the_cut_has_exactly_k_clusters_where_distances_tie(linkage: str) -> None:
    """Corners of a cube and of two equal points: `fcluster` returns fewer than asked for, which is why we replay merges."""
    corners_ED = np.array([[x, y, z] for x in (0.0, 1) for y in (0.0, 1) for z in (0.0, 1)] + [[5.0, 5, 5]] * 2)
    linkage_Z = link(corners_ED, "euclidean", linkage, "here")
    counts = range(1, len(corners_ED) + 1)
    assert any(len(set(hierarchy.fcluster(linkage_Z, k, criterion="maxclust"))) < k for k in counts)
    for num_clusters in counts:
        assert set(cut(linkage_Z, num_clusters).tolist()) == set(range(num_clusters))


def test_equal_experts_are_cut_to_any_number() -> None:
    linkage_Z = link(np.ones((6, 4)), "euclidean", "average", "here")
    for num_clusters in range(1, 7):
        assert len(set(cut(linkage_Z, num_clusters).tolist())) == num_clusters


@pytest.mark.parametrize("linkage", NAIVE)
def test_labels_are_numbered_by_the_smallest_member(linkage: str) -> None:
    linkage_Z = link(features(seed=2), "euclidean", linkage, "here")
    for num_clusters in range(1, NUM_EXPERTS + 1):
        labels = cut(linkage_Z, num_clusters).tolist()
        first_seen = list(dict.fromkeys(labels))
        assert first_seen == list(range(num_clusters))


def test_a_cut_to_all_experts_leaves_each_in_its_place_and_to_one_joins_them() -> None:
    linkage_Z = link(features(seed=2), "euclidean", "average", "here")
    assert cut(linkage_Z, NUM_EXPERTS).tolist() == list(range(NUM_EXPERTS))
    assert cut(linkage_Z, 1).tolist() == [0] * NUM_EXPERTS


def test_a_coarser_cut_joins_two_clusters_of_the_finer_one() -> None:
    linkage_Z = link(features(seed=3), "euclidean", "average", "here")
    for num_clusters in range(1, NUM_EXPERTS):
        coarse, fine = partition(cut(linkage_Z, num_clusters)), partition(cut(linkage_Z, num_clusters + 1))
        (joined,) = coarse - fine
        assert len(fine - coarse) == 2
        assert joined == frozenset().union(*(fine - coarse))


@pytest.mark.parametrize("linkage", NAIVE)
def test_permuting_experts_permutes_labels(linkage: str) -> None:
    feature_ED = features(seed=4)
    order = np.random.default_rng(0).permutation(NUM_EXPERTS)
    for num_clusters in range(1, NUM_EXPERTS + 1):
        labels_E = cut(link(feature_ED, "euclidean", linkage, "here"), num_clusters)
        permuted_E = cut(link(feature_ED[order], "euclidean", linkage, "here"), num_clusters)
        assert partition(permuted_E) == partition(labels_E[order])


def test_the_table_of_labels_holds_every_cut(tmp_path: Path) -> None:
    linkage_Z = link(features(seed=6), "euclidean", "average", "here")
    write_labels(tmp_path / "labels", all_cuts(linkage_Z))
    assert len(read_table(tmp_path / "labels")) == NUM_EXPERTS**2
    for num_clusters in range(1, NUM_EXPERTS + 1):
        np.testing.assert_array_equal(read_labels(tmp_path / "labels", num_clusters), cut(linkage_Z, num_clusters))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_feature_that_is_not_finite_is_named(value: float) -> None:
    feature_ED = features(seed=0)
    feature_ED[4, 2] = value
    with pytest.raises(InputError, match=r"layer 7: the feature of expert 4 is not finite"):
        link(feature_ED, "euclidean", "average", "layer 7")
