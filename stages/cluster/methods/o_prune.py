"""NAEE: the experts are kept whose layer output, with the router among them alone, is nearest to the source's."""

from typing import Annotated, Literal

from pydantic import Field

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class OPrune(Clustering):
    """Which experts are kept."""

    method: Literal["o_prune"] = "o_prune"
    max_subsets: Annotated[int, Field(ge=1, le=1_000_000, strict=True)] = 10_000
    """Sets of experts that are compared in a layer: all that there are, or else so many drawn at random."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Of the sets that are drawn where there are more than max_subsets."""


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[OPrune]) -> LayerPlan:
    """The `num_slots` experts with the least squared error of the layer's output, on the inputs that the source's layer has.

    Lu et al., arXiv:2402.14800: all sets of experts are tried, each with the router's rows of its experts alone, so that tokens
    go to the next best of them with gates made anew. Here the error is that of a sample of the calibration tokens, by inner
    products of the experts' outputs; and where there are more than `max_subsets` sets, so many are drawn, the set of the most
    used experts among them.
    """
    from stages.cluster.plans import kept
    from stages.cluster.subsets import least_error

    if num_slots == evidence.num_experts:
        return kept(evidence, range(num_slots), settings)
    clustering = settings.clustering
    experts = least_error(evidence, num_slots, settings.protected, clustering.max_subsets, clustering.seed)
    return kept(evidence, experts, settings)


METHOD = Method(
    name="o_prune",
    title="NAEE",
    source="arXiv:2402.14800",
    limits="Layers are pruned as if the others were whole; with many experts only a few of their sets can be tried.",
    settings=OPrune,
    plan=plan,
    requires=lambda settings: frozenset({"sampled_output_gram", "sampled_gates", "sampled_logits", "router_choice_bias"}),
    formats=("stock",),
    reads_merging=False,
    keeps_protected=True,
    predicts_routing=True,
    presets={"o-prune": {"export": {"formats": ["stock"]}}},
)
