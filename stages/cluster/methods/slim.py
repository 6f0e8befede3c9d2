"""Slim: every expert stays, with the neurons that are missed most; the router keeps its rows."""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Slim(Clustering):
    """How wide experts are: as many parameters are kept as `num_experts` whole experts have."""

    method: Literal["slim"] = "slim"


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Slim]) -> LayerPlan:
    """All experts as they are, so num_slots is their number. Which of their neurons stay is chosen by recombine."""
    from stages.cluster.plans import kept

    return kept(evidence, range(evidence.num_experts), settings)


METHOD = Method(
    name="slim",
    title="Recombine, slim",
    source="hcsmoe",
    limits="All layers have the same width, and what else the config's width sizes has to keep its size.",
    settings=Slim,
    plan=plan,
    reads_merging=False,
    keeps_all=True,
    needs_choice=True,
    presets={
        "slim": {"export": {"formats": ["stock"]}, "refit": {"mode": "sequential", "neurons": "choose"}},
    },
)
