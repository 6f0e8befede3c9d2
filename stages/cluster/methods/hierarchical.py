"""Agglomerative clustering of experts by their mean outputs, each cluster merged to one expert: HC-SMoE.

Dimensions: E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from stages.cluster.features import Feature, columns_of
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering

if TYPE_CHECKING:
    from stages.contracts.arrow import Array


class Hierarchical(Clustering):
    """How experts are grouped."""

    method: Literal["hierarchical"] = "hierarchical"
    feature: Feature = "expert_output"
    """What experts are compared by: mean output over all tokens; mean router logits over all tokens; mean of output times gate
    over routed tokens; all weights of an expert; or outputs token by token."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """How far apart two experts' features are."""
    linkage: Literal["average", "single", "complete", "ward"] = "average"
    """How far apart two clusters are: the mean, the least or the largest distance of their experts, or Ward's criterion."""

    @model_validator(mode="after")
    def _check_ward(self) -> Self:
        if self.linkage == "ward" and self.distance != "euclidean":
            raise ValueError("linkage is ward, which is defined on euclidean distances alone; set distance to euclidean")
        return self


def linkage(evidence: LayerEvidence, settings: Hierarchical) -> Array:
    """Linkage matrix [E-1, 4] of the experts. Raises InputError naming an expert whose feature is not finite."""
    from stages.cluster.linkage import FEATURES, link  # scipy: the driver, which only reads METHOD, does not need it

    feature_ED = FEATURES[settings.feature](evidence)
    return link(feature_ED, settings.distance, settings.linkage, f"layer {evidence.layer}")


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Hierarchical]) -> LayerPlan:
    """The dendrogram cut to `num_slots` clusters, each merged by the weights that the section `merging` names."""
    from stages.cluster.plans import merged
    from stages.contracts.dendrogram import cut

    return merged(evidence, cut(linkage(evidence, settings.clustering), num_slots), settings)


METHOD = Method(
    name="hierarchical",
    title="HC-SMoE",
    source="arXiv:2410.08589",
    limits="Averages the weights of different experts, which loses more than pruning does where few experts are kept.",
    settings=Hierarchical,
    plan=plan,
    requires=lambda settings: columns_of(settings.feature),
    linkage=linkage,
    presets={
        "hc-smoe": {
            "clustering": {"feature": "expert_output", "distance": "euclidean", "linkage": "average"},
            "merging": {"method": "frequency"},
        },
        "fix-dom": {"merging": {"method": "fix_dominant"}},
        "zipit": {"merging": {"method": "zipit"}},
        "hc-refit": {"merging": {"method": "frequency"}, "refit": {"mode": "sequential"}},
        "hc-recombine": {
            "merging": {"method": "frequency"},
            "refit": {"mode": "sequential", "neurons": "choose"},
            "export": {"router": "fitted"},
        },
    },
)
