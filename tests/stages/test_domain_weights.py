"""Evidence on several domains as one, and the weights that `max_min` chooses, against definitions."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest

from stages.cluster.domains import SALIENCY, max_min_weights, mixed
from stages.contracts.evidence import LayerEvidence, OutputGroups

E = 6


def evidence(num_tokens: int, columns: Mapping[str, Any], **more: Any) -> LayerEvidence:
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    return LayerEvidence(0, num_tokens, num_tokens, len(next(iter(arrays.values()))), arrays, **more)


def with_saliency(*saliency: Any, tokens: tuple[int, ...] = ()) -> list[LayerEvidence]:
    sizes = tokens or (100,) * len(saliency)
    return [evidence(size, {SALIENCY: np.asarray(one, dtype=float)}) for size, one in zip(sizes, saliency, strict=True)]


def largest_sum(values_E: Any, count: int) -> float:
    return float(np.sort(values_E)[-count:].sum())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_kept", [1, 3, 5])
def test_the_weights_are_those_of_the_dual(seed: int, num_kept: int) -> None:
    """On a grid of all lambda, none gives less than the solution; with three domains and unequal numbers of tokens."""
    chance = np.random.default_rng(seed)
    saliency = chance.gamma(0.5, size=(3, E)) * [[1], [10], [100]]
    parts = with_saliency(*saliency, tokens=(64, 128, 32))
    share_DE = saliency / saliency.sum(1, keepdims=True)
    weights = max_min_weights(parts, num_kept)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    # a weight on means over tokens is lambda times the tokens over the saliency
    scaled = weights * saliency.sum(1) / np.array([64, 128, 32])
    ours = largest_sum(scaled / scaled.sum() @ share_DE, num_kept)
    steps = np.linspace(0, 1, 41)
    grid = [
        largest_sum(np.array([a, b, 1 - a - b]) @ share_DE, num_kept) for a, b in product(steps, steps) if a + b <= 1 + 1e-9
    ]
    assert ours <= min(grid) + 1e-9
    assert ours >= min(grid) - 0.05  # the grid comes near


def test_the_domain_that_loses_most_gets_what_it_needs() -> None:
    """Two domains that need other experts: by a plain sum of saliency the first, three times as loud, would take all room."""
    parts = with_saliency([30, 30, 1, 1, 0, 0], [0.2, 0.1, 9, 5, 1, 1])
    kept = np.argsort(-mixed(parts, np.array([0.5, 0.5]))[SALIENCY])[:2]
    assert sorted(kept.tolist()) == [0, 1]
    fair = np.argsort(-mixed(parts, max_min_weights(parts, 2))[SALIENCY])[:2]
    assert sorted(fair.tolist())[0] in (0, 1) and sorted(fair.tolist())[1] == 2


def test_permuting_experts_leaves_the_weights_and_permuting_domains_permutes_them() -> None:
    saliency = np.random.default_rng(3).gamma(0.5, size=(3, E))
    weights = max_min_weights(with_saliency(*saliency), 3)
    order = np.random.default_rng(4).permutation(E)
    assert np.allclose(max_min_weights(with_saliency(*saliency[:, order]), 3), weights)
    assert np.allclose(max_min_weights(with_saliency(*saliency[[2, 0, 1]]), 3), weights[[2, 0, 1]])


def test_a_domain_that_reaches_no_expert_counts_nothing() -> None:
    weights = max_min_weights(with_saliency([1, 2, 3, 4, 5, 6], [0] * E, [3, 3, 1, 1, 1, 1]), 3)
    assert weights[1] == 0 and weights.sum() == pytest.approx(1)
    assert np.allclose(max_min_weights(with_saliency([0] * E, [0] * E), 3), 0.5)


def test_columns_that_are_no_sums_are_not_added() -> None:
    rules = {"largest": "max", "distance": "same", "kept": "tokens"}
    columns = [{"sum": [1.0, 2.0], "largest": [5.0, 1.0], "distance": [7.0, 8.0], "kept": [[[1.0]], [[2.0]]]}]
    rows = [[[3.0], [4.0]], [[5.0], [6.0]]]
    columns.append({"sum": [10.0, 20.0], "largest": [3.0, 4.0], "distance": [7.0, 8.0], "kept": rows})
    found = mixed([evidence(50, one, over_domains=rules) for one in columns], np.array([0.25, 0.75]))
    assert found["sum"].tolist() == [1 / 2 + 3 * 10 / 2, 2 / 2 + 3 * 20 / 2]
    assert found["largest"].tolist() == [5.0, 4.0] and found["distance"].tolist() == [7.0, 8.0]
    assert found["kept"].tolist() == [[[1.0], [3.0], [4.0]], [[2.0], [5.0], [6.0]]]


def test_equal_weights_of_equal_domains_are_plain_sums_and_counts_stay_integers() -> None:
    parts = [evidence(64, {"num_routed_tokens": np.arange(E) + number, "x": np.full(E, 0.1)}) for number in range(3)]
    found = mixed(parts, np.full(3, 1 / 3))
    assert found["num_routed_tokens"].dtype == np.int64
    assert found["num_routed_tokens"].tolist() == [3 * expert + 3 for expert in range(E)]
    assert np.array_equal(found["x"], parts[0]["x"] + parts[1]["x"] + parts[2]["x"])
    assert found.num_tokens == found.num_output_tokens == 192


def test_groups_keep_their_means_weighted() -> None:
    """Group g of the whole is a share of group g of every domain."""
    chance = np.random.default_rng(0)
    parts = []
    for size in (8, 24):
        groups = OutputGroups(np.array([size // 2, size // 2]), chance.normal(size=(E, 2, 4)))
        columns = {"output_sum": groups.output_sum_EGD.sum(1)}
        parts.append(evidence(size, columns, groups=groups))
    found = mixed(parts, np.array([0.5, 0.5]))
    assert found.groups is not None and found.groups.num_tokens_G.tolist() == [16, 16]
    assert np.allclose(found.groups.output_sum_EGD.sum(1), found["output_sum"])
    means = [part["output_sum"] / part.num_tokens for part in parts]
    assert np.allclose(found["output_sum"] / found.num_output_tokens, (means[0] + means[1]) / 2)
