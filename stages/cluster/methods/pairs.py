"""Pairs of experts, chosen so that the neurons that have no room in the pair matter least."""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Pairs(Clustering):
    """How experts are grouped."""

    method: Literal["pairs"] = "pairs"


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Pairs]) -> LayerPlan:
    """Disjoint pairs with the least total loss of neurons; pairs of pairs where fewer than half of the experts are left.

    Where a stock router first picks groups of experts, each group has pairs and slots of its own, equally many.
    """
    from stages.cluster.matching import paired_in_groups
    from stages.cluster.plans import merged

    return merged(evidence, paired_in_groups(evidence["neuron_importance_sum"], num_slots, settings.num_groups), settings)


METHOD = Method(
    name="pairs",
    title="Recombine",
    source="hcsmoe",
    limits="Without refit.neurons: choose, the pairs are averaged, which they are not chosen for.",
    settings=Pairs,
    plan=plan,
    reads_groups=True,
    requires=lambda settings: frozenset({"neuron_importance_sum"}),
    presets={"recombine": {"refit": {"mode": "sequential", "neurons": "choose"}, "export": {"router": "fitted"}}},
)
