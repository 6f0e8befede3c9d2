"""Super experts, and plans that leave some experts as they are, whatever the method.

Dimensions: L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.evidence import PAIRED_AXES, LayerEvidence, OutputGroups
from stages.contracts.layer_plan import LayerPlan, Member, RouterRow, Slot
from stages.contracts.method import Method, PlanSettings

PERCENTILE = 99.5
SHARE_OF_LARGEST = 0.1
SHARE_OF_LAYERS = 0.75


def super_experts(largest_LE: Array) -> Array:
    """Which experts are super experts, bool [L, E] (Su et al., Unveiling Super Experts in MoE LLMs, arXiv:2507.23279).

    largest_LE: the largest absolute value that each expert's down projection gave. A super expert's is above the 99.5th
    percentile of all experts of all layers and above a tenth of the largest of all. The paper also asks that the expert's layer
    is one where massive activations of the hidden states arise, which evidence on experts does not show; in its stead only the
    first three quarters of the layers count, as in the released code of REAP (arXiv:2510.13999).
    """
    threshold = max(float(np.percentile(largest_LE, PERCENTILE)), SHARE_OF_LARGEST * float(largest_LE.max()))
    is_early_L = np.arange(len(largest_LE)) < max(1, int(SHARE_OF_LAYERS * len(largest_LE)))
    return (largest_LE > threshold) & is_early_L[:, None]


def others_of(evidence: LayerEvidence, protected: Sequence[int]) -> list[int]:
    """Experts that are not protected, ascending."""
    return sorted(set(range(evidence.num_experts)) - set(protected))


def restricted(evidence: LayerEvidence, experts: Sequence[int]) -> LayerEvidence:
    """The evidence of some experts alone, numbered anew in the order given."""
    chosen = list(experts)
    columns = {name: values[chosen] for name, values in evidence.columns.items()}
    for name, axis in PAIRED_AXES.items():
        if name in columns:
            columns[name] = columns[name].take(chosen, axis)
    groups = evidence.groups
    if groups is not None:
        groups = OutputGroups(groups.num_tokens_G, groups.output_sum_EGD[chosen])
    return replace(evidence, num_experts=len(chosen), columns=columns, groups=groups)


def planned(method: Method[Any], evidence: LayerEvidence, num_slots: int, settings: PlanSettings[Any]) -> LayerPlan:
    """A method's plan in which every protected expert is a slot of its own, as it is.

    The method plans the other experts from their evidence alone, unless it knows of protected experts itself. Raises InputError
    where the protected ones leave no slot for others that have to be merged.
    """
    if not settings.protected or method.keeps_protected or method.keeps_all:
        return method.plan(evidence, num_slots, settings)
    others = others_of(evidence, settings.protected)
    num_left = num_slots - len(settings.protected)
    if num_left < least_slots(method, evidence.num_experts, 0) * bool(others):
        raise InputError(
            f"layer {evidence.layer}: clustering.protect is super and {len(settings.protected)} of its {evidence.num_experts} "
            f"experts are super experts, which leaves {num_left} of {num_slots} slots to the others; raise "
            "clustering.num_experts, or set protect to none"
        )
    slots = [_untouched(expert, settings) for expert in settings.protected]
    if num_left == len(others):
        slots += [_untouched(expert, settings) for expert in others]
    elif num_left:
        plan = method.plan(restricted(evidence, others), num_left, replace(settings, protected=()))
        slots += [_renamed(slot, others) for slot in plan.slots]
    return LayerPlan(evidence.layer, evidence.num_experts, tuple(sorted(slots, key=lambda slot: min(slot.experts))))


def least_slots(method: Method[Any], num_experts: int, num_protected: int) -> int:
    """Fewest slots of a layer: the protected experts, and where experts are merged one for all others."""
    return num_protected + (1 if method.reads_merging and num_protected < num_experts else 0)


def _untouched(expert: int, settings: PlanSettings[Any]) -> Slot:
    row = RouterRow(((expert, 1.0),)) if settings.router is not None else None
    return Slot((expert,), (Member(expert),), row=row)


def _renamed(slot: Slot, names: Sequence[int]) -> Slot:
    """The slot of a plan of some experts, with their own numbers."""
    row = None if slot.row is None else RouterRow(tuple((names[expert], weight) for expert, weight in slot.row.parts))
    members = tuple(replace(member, expert=names[member.expert]) for member in slot.members)
    return replace(slot, experts=tuple(names[expert] for expert in slot.experts), members=members, row=row)
