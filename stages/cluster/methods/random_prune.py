"""Random experts are kept: the control that every pruning rule has to beat."""

from typing import Annotated, Literal

from pydantic import Field

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class RandomPrune(Clustering):
    """Which experts are kept."""

    method: Literal["random_prune"] = "random_prune"
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Decides which experts are kept."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[RandomPrune]) -> LayerPlan:
    """`num_slots` experts, drawn anew for each layer."""
    import numpy as np

    from stages.cluster.linkage import expert_output
    from stages.cluster.order import by_content
    from stages.cluster.plans import kept

    chance = np.random.default_rng((settings.clustering.seed, evidence.layer))
    drawn = chance.permutation(evidence.num_experts)[:num_slots]
    return kept(evidence, by_content(expert_output(evidence))[drawn].tolist(), settings)


METHOD = Method(
    name="random_prune",
    title="Random pruning",
    source="a control",
    limits="It knows nothing of the experts; run several seeds before you compare.",
    settings=RandomPrune,
    plan=plan,
    formats=("stock",),
    reads_merging=False,
    presets={"random-prune": {"export": {"formats": ["stock"]}}},
)
