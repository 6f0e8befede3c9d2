"""How certain a clustering is: standard errors of the mean outputs, and whether halves of the data cluster alike.

Dimensions: D feature size, E experts, G groups of sequences, K clusters.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.dendrogram import cut
from stages.contracts.evidence import LayerEvidence, OutputGroups

NUM_DRAWS = 32
"""Random halves of the groups."""


def relative_standard_errors(groups: OutputGroups) -> Array:
    """Standard error of every expert's mean output over the norm of the mean, [E]; infinite or NaN where that is zero.

    Random groups (Wolter, Introduction to Variance Estimation, 2nd ed., section 2.4): with the mean m_g of group g and the
    mean m of all, var(m) = sum_g ||m_g - m||^2 / (G (G - 1)), here summed over the D dimensions. Groups are of sequences,
    whole, since tokens of one sequence resemble each other.
    """
    num_tokens_G, output_sum_EGD = groups.num_tokens_G, groups.output_sum_EGD
    num_groups = len(num_tokens_G)
    mean_EGD = output_sum_EGD / num_tokens_G[:, None]
    mean_ED = output_sum_EGD.sum(1) / num_tokens_G.sum()
    variance_E = np.square(mean_EGD - mean_ED[:, None]).sum((1, 2)) / (num_groups * (num_groups - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(variance_E) / np.linalg.norm(mean_ED, axis=1)  # type: ignore[no-any-return]


def adjusted_rand_index(one_E: Array, other_E: Array) -> float:
    """Agreement of two clusterings: 1 when equal, 0 on average by chance (Hubert and Arabie, 1985, eq. 5)."""
    pairs = np.zeros((one_E.max() + 1, other_E.max() + 1))
    np.add.at(pairs, (one_E, other_E), 1)

    def choose_two(counts: Array) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, ones, others = choose_two(pairs), choose_two(pairs.sum(1)), choose_two(pairs.sum(0))
    num_pairs = len(one_E) * (len(one_E) - 1) / 2
    by_chance = ones * others / num_pairs if num_pairs else 0.0
    most = (ones + others) / 2
    return 1.0 if most == by_chance else (together - by_chance) / (most - by_chance)


def halves(num_groups: int, seed: int) -> Iterator[Array]:
    """NUM_DRAWS random halves of the groups, without replacement in a draw."""
    chance = np.random.default_rng(seed)
    for _ in range(NUM_DRAWS):
        yield np.sort(chance.choice(num_groups, num_groups // 2, replace=False))


def stability(
    evidence: LayerEvidence, linkage_Z: Array, linkage: Callable[[LayerEvidence], Array], seed: int
) -> tuple[Array, Array]:
    """For every K from 1 to E: the share of halves of the groups whose labels are those of all, and the mean adjusted Rand
    index.

    linkage: clusters one half. linkage_Z: what it gives for the whole.
    """
    assert evidence.groups is not None
    groups, num_experts = evidence.groups, len(linkage_Z) + 1
    counts = range(1, num_experts + 1)
    whole = [cut(linkage_Z, k) for k in counts]
    equal_K, index_K = np.zeros(num_experts), np.zeros(num_experts)
    for chosen in halves(len(groups.num_tokens_G), seed):
        half = replace(
            evidence,
            columns={**evidence.columns, "output_sum": groups.output_sum_EGD[:, chosen].sum(1)},
            num_output_tokens=int(groups.num_tokens_G[chosen].sum()),
        )
        half_Z = linkage(half)
        for k in counts:
            labels_E = cut(half_Z, k)
            equal_K[k - 1] += np.array_equal(labels_E, whole[k - 1])
            index_K[k - 1] += adjusted_rand_index(labels_E, whole[k - 1])
    return equal_K / NUM_DRAWS, index_K / NUM_DRAWS
