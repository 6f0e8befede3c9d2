"""Layer plans of the two usual shapes: clusters of experts merged, and single experts kept.

Dimensions: E experts.
"""

from collections.abc import Iterable

from stages.cluster.weights import COMBINATIONS, clusters_of, unweighted_clusters
from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan, Member, RouterRow, Slot
from stages.contracts.method import PlanSettings, S


def merged(evidence: LayerEvidence, labels_E: Array, settings: PlanSettings[S]) -> LayerPlan:
    """Every cluster becomes one expert, the weighted sum of its members. labels_E: cluster of each expert, 0, 1, ...

    A cluster that no token was sent to gets equal weights; the report names it.
    """
    rule = settings.merging.method
    weighted, unweighted = COMBINATIONS[rule](evidence, labels_E), unweighted_clusters(evidence, labels_E, rule)
    rows = COMBINATIONS[settings.router](evidence, labels_E) if settings.router is not None else None
    slots = [
        Slot(
            experts=tuple(experts),
            members=tuple(Member(expert, weight) for expert, weight in weighted[number]),
            row=RouterRow(tuple(rows[number])) if rows is not None else None,
            is_unweighted=number in unweighted,
        )
        for number, experts in enumerate(clusters_of(labels_E))
    ]
    return LayerPlan(evidence.layer, evidence.num_experts, tuple(slots))


def kept(evidence: LayerEvidence, experts: Iterable[int], settings: PlanSettings[S]) -> LayerPlan:
    """Some experts stay as they are, with their router rows; the others are dropped."""
    row = settings.router is not None
    slots = (Slot((expert,), (Member(expert),), row=RouterRow(((expert, 1.0),)) if row else None) for expert in sorted(experts))
    return LayerPlan(evidence.layer, evidence.num_experts, tuple(slots))
