"""Score pruning: the experts with the largest router scores are kept."""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class SPrune(Clustering):
    """Which experts are kept."""

    method: Literal["s_prune"] = "s_prune"


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[SPrune]) -> LayerPlan:
    """The `num_slots` experts with the largest mean router score over all tokens, routed or not."""
    from stages.cluster.plans import kept
    from stages.cluster.saliency import largest

    return kept(evidence, largest(evidence["router_probability_sum"], num_slots), settings)


METHOD = Method(
    name="s_prune",
    title="S-prune",
    source="HC-SMoE, arXiv:2410.08589 (a baseline there)",
    limits="The router knows nothing of how large an expert's output is.",
    settings=SPrune,
    plan=plan,
    formats=("stock",),
    reads_merging=False,
    presets={"s-prune": {"export": {"formats": ["stock"]}}},
)
