"""Groups of experts by repeated pairing, given what a group loses. No torch.

Dimensions: E experts.
"""

from collections.abc import Callable, Sequence

EXACT_EXPERTS = 64
"""With more groups than this, pairs are chosen greedily, the cheapest first: exact matching takes cubic time."""

Loss = Callable[[Sequence[int]], float]
"""What is lost where these experts become one."""


def grouped(experts: Sequence[int], num_groups: int, lost: Loss) -> list[list[int]]:
    """So many groups of the experts: pairs with the least total loss, then pairs of what has become of them.

    Equal losses are decided by the numbers of the experts.
    """
    groups = [[expert] for expert in experts]
    while len(groups) > num_groups:
        num_pairs = min(len(groups) - num_groups, len(groups) // 2)
        pairs = _pairs(lost, groups, num_pairs)
        joined = {number for pair in pairs for number in pair}
        alone = [group for number, group in enumerate(groups) if number not in joined]
        groups = [*alone, *(sorted(groups[one] + groups[other]) for one, other in pairs)]
    return sorted(groups)


def grouped_in_runs(num_experts: int, num_groups: int, num_runs: int, lost: Loss) -> list[list[int]]:
    """Groups as `grouped` makes them, within num_runs runs of equally many experts, each with as many groups."""
    size, share = num_experts // num_runs, num_groups // num_runs
    return [
        group for run in range(num_runs) for group in grouped(range(run * size, (run + 1) * size), share, lost)
    ]  # fmt: skip


def _pairs(lost: Loss, groups: list[list[int]], num_pairs: int) -> list[tuple[int, int]]:
    """So many disjoint pairs of groups with the least total cost: what is lost by joining them."""
    own = [lost(group) for group in groups]
    cost = {
        (one, other): lost(groups[one] + groups[other]) - own[one] - own[other]
        for one in range(len(groups))
        for other in range(one + 1, len(groups))
    }
    return _exact(cost, len(groups), num_pairs) if len(groups) <= EXACT_EXPERTS else _greedy(cost, num_pairs)


def _exact(cost: dict[tuple[int, int], float], num_groups: int, num_pairs: int) -> list[tuple[int, int]]:
    """A perfect matching on the groups and, for each that stays alone, a partner that costs nothing."""
    import networkx  # slow to import, and only what pairs needs it

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
