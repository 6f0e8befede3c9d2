"""EAN: the experts with the largest outputs, on the tokens that are routed to them, are kept."""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Ean(Clustering):
    """Which experts are kept."""

    method: Literal["ean"] = "ean"
    statistic: Literal["mean", "sum"] = "mean"
    """Over routed tokens. The sum also counts how often an expert is used."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Ean]) -> LayerPlan:
    """The `num_slots` experts with the largest ||E_e(x)||, its mean over routed tokens or its sum."""
    from stages.cluster.plans import kept
    from stages.cluster.saliency import largest, over_routed

    column = "output_norm_sum"
    score_E = evidence[column] if settings.clustering.statistic == "sum" else over_routed(evidence, column)
    return kept(evidence, largest(score_E, num_slots), settings)


METHOD = Method(
    name="ean",
    title="EAN",
    source="REAP, arXiv:2510.13999 (a baseline there)",
    limits="An output that its gate makes small counts in full.",
    settings=Ean,
    plan=plan,
    requires=lambda settings: frozenset({"output_norm_sum"}),
    formats=("stock",),
    reads_merging=False,
    presets={"ean": {"export": {"formats": ["stock"]}}},
)
