"""Groups of experts by repeated pairing.

Dimensions: E experts, F neurons of an expert.
"""

import networkx
import numpy as np

from stages.cluster.order import canonical
from stages.contracts.arrow import Array

EXACT_EXPERTS = 64
"""With more groups than this, pairs are chosen greedily, the cheapest first: exact matching takes cubic time."""


def lost(importance_EF: Array, group: list[int]) -> float:
    """Importance of the neurons for which a slot of F neurons has no room: all but the F most important of the group."""
    ranked = np.sort(importance_EF[group].reshape(-1))
    return float(ranked[: -importance_EF.shape[1]].sum())


def paired(importance_EF: Array, num_slots: int) -> Array:
    """Labels [E] of `num_slots` groups: pairs with the least total loss, then pairs of what has become of them.

    Equal losses are decided by the numbers of the experts. Importance is taken as a share of the layer's sum.
    """
    relative_EF = importance_EF / max(float(importance_EF.sum()), np.finfo(np.float64).tiny)
    groups = [[expert] for expert in range(len(importance_EF))]
    while len(groups) > num_slots:
        num_pairs = min(len(groups) - num_slots, len(groups) // 2)
        pairs = _pairs(relative_EF, groups, num_pairs)
        joined = {number for pair in pairs for number in pair}
        alone = [group for number, group in enumerate(groups) if number not in joined]
        groups = [*alone, *(sorted(groups[one] + groups[other]) for one, other in pairs)]
    labels_E = np.empty(len(importance_EF), dtype=np.int64)
    for number, group in enumerate(groups):
        labels_E[group] = number
    return canonical(labels_E)


def paired_in_groups(importance_EF: Array, num_slots: int, num_groups: int) -> Array:
    """Labels [E] as `paired` gives them, within num_groups runs of equally many experts, each with as many slots."""
    parts = np.split(importance_EF, num_groups)
    labels = [
        paired(part_EF, num_slots // num_groups) + number * (num_slots // num_groups) for number, part_EF in enumerate(parts)
    ]
    return np.concatenate(labels)


def _pairs(importance_EF: Array, groups: list[list[int]], num_pairs: int) -> list[tuple[int, int]]:
    """So many disjoint pairs of groups with the least total cost: what is lost by joining them."""
    own = [lost(importance_EF, group) for group in groups]
    cost = {
        (one, other): lost(importance_EF, groups[one] + groups[other]) - own[one] - own[other]
        for one in range(len(groups))
        for other in range(one + 1, len(groups))
    }
    return _exact(cost, len(groups), num_pairs) if len(groups) <= EXACT_EXPERTS else _greedy(cost, num_pairs)


def _exact(cost: dict[tuple[int, int], float], num_groups: int, num_pairs: int) -> list[tuple[int, int]]:
    """A perfect matching on the groups and, for each that stays alone, a partner that costs nothing."""
    graph = networkx.Graph()
    graph.add_weighted_edges_from((one, other, value) for (one, other), value in cost.items())
    for partner in range(num_groups, 2 * (num_groups - num_pairs)):
        graph.add_weighted_edges_from((group, partner, 0.0) for group in range(num_groups))
    matching = networkx.min_weight_matching(graph)
    return sorted((min(pair), max(pair)) for pair in matching if max(pair) < num_groups)


def _greedy(cost: dict[tuple[int, int], float], num_pairs: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    taken: set[int] = set()
    for one, other in sorted(cost, key=lambda pair: (cost[pair], pair)):
        if len(found) == num_pairs:
            break
        if not {one, other} & taken:
            found.append((one, other))
            taken |= {one, other}
    return found
