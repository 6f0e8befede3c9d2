"""The plan of a layer that no calibration reaches, from the plan of another layer and its own experts' weights.

Dimensions: E experts.
"""

import numpy as np
from scipy.cluster.hierarchy import average
from scipy.spatial.distance import squareform

from stages.contracts.arrow import Array
from stages.contracts.dendrogram import cut
from stages.contracts.layer_plan import DROPPED, LayerPlan, Member, RouterRow, Slot


def distances(gram_EE: Array) -> Array:
    """Euclidean distances [E, E] of vectors with these inner products; 0 where rounding makes a square negative."""
    square_E = np.diag(gram_EE)
    distance_EE = np.sqrt((square_E[:, None] + square_E - 2 * (gram_EE + gram_EE.T) / 2).clip(min=0))
    np.fill_diagonal(distance_EE, 0.0)
    return distance_EE  # type: ignore[no-any-return]


def follow(plan: LayerPlan, layer: int, distance_EE: Array, num_groups: int) -> LayerPlan:
    """A plan for `layer` with as many slots as `plan` has, made of the layer's own clusters, not of those of `plan`.

    This layer's own weights tell which of its experts are alike: expert 5 here has nothing in common with expert 5 of another
    layer. Clusters are those of average linkage of the distances, equally many in each of the num_groups runs of experts that a
    router first chooses from. What becomes of a cluster follows `plan`:

    - it drops experts: the cluster's medoid stays as it is, with its router row, and the others are dropped;
    - each of its slots is one whole expert for several: the medoid, for its cluster;
    - else the mean of the cluster, with equal weights, as nothing is known of use. Neurons that `plan` chooses, and values that
      it replaces, were found for other experts, and are ignored.

    The row of a stock router is the medoid's where `plan` takes single rows, else the mean of the cluster's.
    """
    num_experts, num_slots = len(distance_EE), len(plan.slots)
    assert plan.num_experts == num_experts and not num_experts % num_groups and not num_slots % num_groups
    drops = bool((plan.slot_E == DROPPED).any())
    takes_one = drops or all(_is_one(slot) for slot in plan.slots)
    takes_one_row = drops or all(slot.row is not None and len(slot.row.parts) == 1 for slot in plan.slots)
    slots = []
    for run in np.split(np.arange(num_experts), num_groups):
        for members in _clusters(distance_EE[np.ix_(run, run)], num_slots // num_groups):
            experts = run[members].tolist()
            medoid = _medoid(experts, distance_EE)
            alike = [(expert, 1 / len(experts)) for expert in experts]
            slots.append(
                Slot(
                    experts=(medoid,) if drops else tuple(experts),
                    members=(Member(medoid),) if takes_one else tuple(Member(*one) for one in alike),
                    row=RouterRow(((medoid, 1.0),) if takes_one_row else tuple(alike)),
                )
            )
    return LayerPlan(layer, num_experts, tuple(slots))


def _is_one(slot: Slot) -> bool:
    """Whether a slot is a single expert, whole."""
    (first, *others) = slot.members
    return not others and first.neurons is None and first.places is None


def _clusters(distance_EE: Array, num_clusters: int) -> list[list[int]]:
    """Experts of each cluster, ascending; clusters by their smallest expert."""
    linkage_Z = average(squareform(distance_EE, checks=False))
    labels_E = cut(linkage_Z, num_clusters)
    return [np.flatnonzero(labels_E == label).tolist() for label in range(num_clusters)]


def _medoid(experts: list[int], distance_EE: Array) -> int:
    """The expert with the least sum of distances to the others (Kaufman and Rousseeuw, 1987); of equals the first."""
    return experts[int(distance_EE[np.ix_(experts, experts)].sum(1).argmin())]
