"""Pairs, HC-SMoE's clusters, or REAP's survivors: in every layer what a held slice of the calibration text says."""

from typing import Any, Literal

from stages.cluster.methods import adopt, hierarchical, pairs, reap
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Alternative, Method, PairCost, PlanSettings
from stages.contracts.settings import Clustering


class Best(Clustering):
    """How the pairs among the candidates are chosen."""

    method: Literal["best"] = "best"
    pair_cost: PairCost = "auto"
    """As of the method pairs."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Any]) -> LayerPlan:
    """Pairs, the first candidate. The others are planned beside them, and recombine takes one in each layer."""
    return pairs.METHOD.plan(evidence, num_slots, settings)


def clusters(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Any]) -> LayerPlan:
    """HC-SMoE's clusters."""
    from dataclasses import replace

    from stages.cluster.methods.hierarchical import Hierarchical

    chosen = replace(settings, clustering=Hierarchical(num_experts=settings.clustering.num_experts))
    return hierarchical.METHOD.plan(evidence, num_slots, chosen)


METHOD = Method(
    name="best",
    title="Recombine, best of several",
    source="hcsmoe",
    limits="As many layers are solved as there are candidates; layers are compared one at a time, in order.",
    settings=Best,
    plan=plan,
    reads_groups=True,
    needs_choice=True,
    requires=lambda settings: frozenset({"neuron_importance_sum"}),
    pair_cost=lambda settings: settings.pair_cost,
    alternatives={
        "clusters": Alternative(clusters),
        "survivors": Alternative(adopt.METHOD.plan, ("stock",)),
        "pruned": Alternative(reap.METHOD.plan, ("stock",)),
    },
    presets={
        "best": {
            "refit": {"mode": "sequential", "neurons": "choose", "shared_expert": True},
            "export": {"router": "fitted"},
        },
    },
)
