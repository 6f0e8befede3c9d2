"""A method: every expert joins the nearest of the experts that are used most."""

from typing import Literal

import numpy as np

from stages.cluster.plans import merged
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Nearest(Clustering):
    method: Literal["nearest"] = "nearest"
    power: float = 2.0
    """Of the differences that a distance adds up."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Nearest]) -> LayerPlan:
    mean_ED = evidence["output_sum"] / evidence.num_output_tokens
    leaders = np.sort(np.argsort(-evidence["num_routed_tokens"], kind="stable")[:num_slots])
    distance_EK = (np.abs(mean_ED[:, None] - mean_ED[None, leaders]) ** settings.clustering.power).sum(-1)
    return merged(evidence, distance_EK.argmin(1), settings)


METHOD = Method(
    name="nearest",
    title="Nearest",
    source="nowhere",
    limits="A toy.",
    settings=Nearest,
    plan=plan,
    presets={"nearest": {"merging": {"method": "average"}}},
)
