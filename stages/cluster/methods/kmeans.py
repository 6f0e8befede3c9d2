"""k-means over the experts' features, each cluster merged to one expert."""

from typing import Annotated, Literal

from pydantic import Field

from stages.cluster.features import Feature, columns_of
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class KMeans(Clustering):
    """How experts are grouped."""

    method: Literal["kmeans"] = "kmeans"
    feature: Feature = "expert_output"
    """What experts are compared by, as of hierarchical clustering."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Of the first centres (k-means++)."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[KMeans]) -> LayerPlan:
    """`num_slots` clusters by Lloyd's algorithm from k-means++ centres (Arthur and Vassilvitskii, 2007).

    Where it leaves a cluster empty, the expert that lies farthest from its centre gets it.
    """
    import numpy as np

    from stages.cluster.linkage import FEATURES, check_finite
    from stages.cluster.lloyd import clusters
    from stages.cluster.order import in_order_of
    from stages.cluster.plans import merged

    feature_ED = FEATURES[settings.clustering.feature](evidence)
    check_finite(feature_ED, f"layer {evidence.layer}")
    chance = np.random.default_rng((settings.clustering.seed, evidence.layer))
    return merged(evidence, in_order_of(feature_ED, lambda sorted_ED: clusters(sorted_ED, num_slots, chance)), settings)


METHOD = Method(
    name="kmeans",
    title="k-means",
    source="HC-SMoE, arXiv:2410.08589 (compared there)",
    limits="Depends on its seed, which hierarchical clustering does not.",
    settings=KMeans,
    plan=plan,
    requires=lambda settings: columns_of(settings.feature),
    presets={"kmeans": {}},
)
