"""REAP's survivors keep their router rows, and adopt neurons of the experts that are dropped."""

from typing import Literal

from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.settings import Clustering


class Adopt(Clustering):
    """Which experts survive, and whose neurons they may adopt."""

    method: Literal["adopt"] = "adopt"


def plan(evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Adopt]) -> LayerPlan:
    """The `num_slots` experts that REAP keeps. Their slots choose from the neurons of dropped experts too.

    Survivors take turns, the most salient first. Each takes the dropped experts whose router logits are most similar (cosine
    over all tokens), as their tokens are the likeliest to come to it, and no more than an equal share of them.
    """
    from dataclasses import replace

    from stages.cluster.groups import absorbed, logit_cosines
    from stages.cluster.plans import kept
    from stages.cluster.saliency import largest, reap
    from stages.contracts.layer_plan import Member

    survivors = largest(reap(evidence), num_slots)
    share = -(-(evidence.num_experts - num_slots) // num_slots)
    label_E = absorbed(survivors, logit_cosines(evidence), share).tolist()
    found = kept(evidence, survivors, settings)
    slots = []
    for slot in found.slots:
        (own,) = slot.experts
        adopted = [expert for expert, label in enumerate(label_E) if label == label_E[own] and expert != own]
        slots.append(replace(slot, members=(*slot.members, *(Member(expert, 0.0) for expert in adopted))))
    return replace(found, slots=tuple(slots))


METHOD = Method(
    name="adopt",
    title="REAP with adopted neurons",
    source="hcsmoe",
    limits="A slot sees only the tokens that its survivor's router row chooses, so it can mend no other.",
    settings=Adopt,
    plan=plan,
    formats=("stock",),
    reads_merging=False,
    needs_choice=True,
    presets={
        "reap-recombine": {"export": {"formats": ["stock"]}, "refit": {"mode": "sequential", "neurons": "choose"}},
    },
)
