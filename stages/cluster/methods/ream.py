"""REAM's grouping: the most salient experts are centres, and each takes in its nearest neighbours in turn."""

from typing import Annotated, Literal

from pydantic import Field

from stages.cluster.features import Feature, columns_of
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Ream(Clustering):
    """How experts are grouped."""

    method: Literal["ream"] = "ream"
    feature: Feature = "gated_output"
    """What experts are compared by, as of hierarchical clustering."""
    max_absorbed: Annotated[int, Field(ge=1, strict=True)] = 16
    """Experts that a centre takes in at most. Where that leaves some over, they join the nearest centre."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Ream]) -> LayerPlan:
    """Clusters around the `num_slots` experts with the largest REAP saliency, which choose in that order."""
    from stages.cluster.groups import absorbed, cosines
    from stages.cluster.linkage import FEATURES, check_finite
    from stages.cluster.plans import merged
    from stages.cluster.saliency import largest, reap

    feature_ED = FEATURES[settings.clustering.feature](evidence)
    check_finite(feature_ED, f"layer {evidence.layer}")
    centers = largest(reap(evidence), num_slots)
    return merged(evidence, absorbed(centers, cosines(feature_ED), settings.clustering.max_absorbed), settings)


METHOD = Method(
    name="ream",
    title="REAM",
    source="arXiv:2604.04356",
    limits="The authors align neurons first (here: merging.align) and recompute the layers that follow.",
    settings=Ream,
    plan=plan,
    requires=lambda settings: columns_of(settings.feature),
    presets={"ream": {"merging": {"method": "saliency"}}},
)
