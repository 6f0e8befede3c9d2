"""Frequency pruning: the experts that are used most are kept."""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class FPrune(Clustering):
    """Which experts are kept."""

    method: Literal["f_prune"] = "f_prune"


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[FPrune]) -> LayerPlan:
    """The `num_slots` experts with the most routed tokens, f_e."""
    from stages.cluster.plans import kept
    from stages.cluster.saliency import largest

    return kept(evidence, largest(evidence["num_routed_tokens"], num_slots), settings)


METHOD = Method(
    name="f_prune",
    title="F-prune",
    source="HC-SMoE, arXiv:2410.08589 (a baseline there)",
    limits="What an expert that is seldom used knows is lost, however much it says when it is used.",
    settings=FPrune,
    plan=plan,
    formats=("stock",),
    reads_merging=False,
    presets={"f-prune": {"export": {"formats": ["stock"]}}},
)
