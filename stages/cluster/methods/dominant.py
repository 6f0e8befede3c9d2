"""M-SMoE's grouping: the experts that are used most are centres, the others join the most similar by router logits."""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Dominant(Clustering):
    """How experts are grouped."""

    method: Literal["dominant"] = "dominant"


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Dominant]) -> LayerPlan:
    """Clusters around the `num_slots` most used experts.

    The similarity of two experts is the cosine of their router logits over all tokens. Of equally similar centres the first.
    """
    from stages.cluster.groups import around, logit_cosines
    from stages.cluster.plans import merged
    from stages.cluster.saliency import largest

    centers = largest(evidence["num_routed_tokens"], num_slots)
    return merged(evidence, around(centers, logit_cosines(evidence)), settings)


METHOD = Method(
    name="dominant",
    title="M-SMoE",
    source="arXiv:2310.01334",
    limits="Experts are merged as they are, unless merging.align brings their neurons into one order first, as the paper does.",
    settings=Dominant,
    plan=plan,
    presets={
        "m-smoe": {"merging": {"method": "frequency"}},
        "m-smoe-global": {
            "merging": {"method": "frequency"},
            "budget": {"kind": "usage"},
            "export": {"formats": ["tied"]},
        },
    },
)
