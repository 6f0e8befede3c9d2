"""Pairs of experts, chosen so that the neurons that have no room in the pair matter least.

With `pair_cost: elimination` these pairs are where recombine starts from: it chooses anew, among the experts' real outputs.
"""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PairCost, PlanSettings
from stages.contracts.settings import Clustering


class Pairs(Clustering):
    """How experts are grouped."""

    method: Literal["pairs"] = "pairs"
    pair_cost: PairCost = "importance"
    """By what pairs are compared. importance: the importance of the neurons that find no room. elimination: the error of the
    layer's output once a slot's neurons are chosen and what they feed is solved, with the gates that a stock export will give;
    only with refit.neurons choose. auto: elimination where all pairs of a layer take at most 1e15 floating-point operations."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Pairs]) -> LayerPlan:
    """Disjoint pairs with the least total loss of neurons; pairs of pairs where fewer than half of the experts are left.

    Where a stock router first picks groups of experts, each group has pairs and slots of its own, equally many.
    """
    from stages.cluster.matching import paired
    from stages.cluster.plans import merged

    return merged(evidence, paired(evidence["neuron_importance_sum"], num_slots, settings.num_groups), settings)


METHOD = Method(
    name="pairs",
    title="Recombine",
    source="hcsmoe",
    limits="Without refit.neurons: choose, the pairs are averaged, which they are not chosen for.",
    settings=Pairs,
    plan=plan,
    reads_groups=True,
    requires=lambda settings: frozenset({"neuron_importance_sum"}),
    pair_cost=lambda settings: settings.pair_cost,
    presets={
        "recombine": {
            "clustering": {"pair_cost": "auto"},
            "refit": {"mode": "sequential", "neurons": "choose", "shared_expert": True},
            "export": {"router": "fitted"},
        },
    },
)
