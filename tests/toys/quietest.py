"""A pruning rule: the experts whose outputs are never large are dropped. It needs a collector of its own, `loudest`."""

from typing import Literal

import numpy as np

from stages.cluster.plans import kept
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Quietest(Clustering):
    method: Literal["quietest"] = "quietest"


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Quietest]) -> LayerPlan:
    return kept(evidence, np.argsort(-evidence["largest_norm"], kind="stable")[:num_slots].tolist(), settings)


METHOD = Method(
    name="quietest",
    title="Quietest",
    source="nowhere",
    limits="A toy.",
    settings=Quietest,
    plan=plan,
    requires=lambda settings: frozenset({"largest_norm"}),
    formats=("stock",),
    reads_merging=False,
    presets={"quietest": {"export": {"formats": ["stock"]}}},
)
