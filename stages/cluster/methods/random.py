"""Random groups of experts, merged: the control that every clustering has to beat."""

from typing import Annotated, Literal

from pydantic import Field

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Random(Clustering):
    """How experts are grouped."""

    method: Literal["random"] = "random"
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Decides the groups."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Random]) -> LayerPlan:
    """`num_slots` groups as equally large as can be, drawn anew for each layer."""
    import numpy as np

    from stages.cluster.linkage import expert_output
    from stages.cluster.order import in_order_of
    from stages.cluster.plans import merged

    chance = np.random.default_rng((settings.clustering.seed, evidence.layer))
    labels_E = in_order_of(expert_output(evidence), lambda feature_ED: chance.permutation(len(feature_ED)) % num_slots)
    return merged(evidence, labels_E, settings)


METHOD = Method(
    name="random",
    title="Random groups",
    source="HC-SMoE, arXiv:2410.08589 (a control)",
    limits="It knows nothing of the experts; run several seeds before you compare.",
    settings=Random,
    plan=plan,
    presets={"random": {}},
)
