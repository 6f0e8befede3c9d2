"""REAP: the experts that add most to the output, on the tokens that are routed to them, are kept."""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Reap(Clustering):
    """Which experts are kept."""

    method: Literal["reap"] = "reap"


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Reap]) -> LayerPlan:
    """The `num_slots` experts with the largest mean over routed tokens of gate * ||E_e(x)||."""
    from stages.cluster.plans import kept
    from stages.cluster.saliency import largest, reap

    return kept(evidence, largest(reap(evidence), num_slots), settings)


METHOD = Method(
    name="reap",
    title="REAP",
    source="arXiv:2510.13999",
    limits="What is dropped is lost: tokens of a dropped expert go to their next best, which nothing adapts to.",
    settings=Reap,
    plan=plan,
    formats=("stock",),
    reads_merging=False,
    presets={
        "reap": {"export": {"formats": ["stock"]}},
        "reap-refit": {"export": {"formats": ["stock"]}, "refit": {"mode": "sequential"}},
    },
)
