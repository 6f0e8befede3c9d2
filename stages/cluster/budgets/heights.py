"""The cheapest merges of all layers' dendrograms first.

Dimensions: E experts, N numbers of experts.
"""

from collections.abc import Sequence

from stages.contracts.arrow import Array
from stages.contracts.budget import BudgetKind, Planner


def costs(planner: Planner, num_slots: Sequence[int]) -> Array:
    """Sum of the heights of the merges that leave so many experts, [N], in the units of the method's distance.

    Heights grow from merge to merge, so the least sum over all layers takes the lowest merges of all layers. Protected experts
    are left out of the dendrogram.
    """
    import numpy as np

    from stages.cluster.protection import others_of, restricted

    linkage, settings = planner.method.linkage, planner.settings
    assert linkage is not None, planner.method.name
    others = others_of(planner.evidence, settings.protected)
    if len(others) < 2:
        return np.zeros(len(num_slots))
    height_M = linkage(restricted(planner.evidence, others), settings.clustering)[:, 2]
    return np.array([height_M[: planner.evidence.num_experts - count].sum() for count in num_slots])


BUDGET = BudgetKind(
    name="heights",
    title="Lowest merges of all layers",
    source="hcsmoe",
    limits="A distance is not what a merge costs, and layers with small outputs are merged most, whether they matter or not.",
    costs=costs,
    needs_linkage=True,
)
