"""What the page shows of each layer: distances, use and saliency, dendrograms, plans, errors of refit.

Dimensions: L MoE layers, E experts, D domains, P pairs of experts, H hidden size.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import pdist

from stages.contracts.arrow import Array
from stages.contracts.dendrogram import read_dendrogram
from stages.contracts.evidence import LayerEvidence, read_evidence
from stages.contracts.layer_plan import LayerPlan, read_plan
from stages.contracts.paths import dendrogram_file, domain_dir, plan_file
from stages.contracts.units import Job
from stages.report.packing import packed, scaled
from stages.report.spec import ReportArgs

Values = dict[str, Any]


def layer_values(job: Job[ReportArgs], layers: Sequence[int], num_experts: int) -> Values:
    """Values of all MoE layers, in their order. Plans and dendrograms that several targets share stand there once."""
    args = job.args
    domains = args.domains or ("",)
    distances, use, saliency = [], [], []
    for layer in layers:
        parts = [read_evidence(domain_dir(job.run_dir / args.calibrate_dir, domain), layer) for domain in domains]
        distances.append(_distances(parts))
        use += [part["num_routed_tokens"] / max(1, part.num_tokens) for part in parts]
        saliency += [part["gated_output_norm_sum"] / max(1, part.num_tokens) for part in parts]
    plans, dendrograms = _Shared(), _Shared()
    targets = []
    for target in args.targets:
        folder = target.dendrogram_dir
        targets.append(
            {
                "name": target.name,
                "num_kept": [target.num_merged[layer] for layer in layers],
                "plan": plans.place(_plans(job.run_dir / target.final_plan_dir, layers)),
                "dendrogram": None if folder is None else dendrograms.place(_dendrograms(job.run_dir / folder, layers)),
                "refit": [vars(target.refits[layer]) if layer in target.refits else None for layer in layers],
                "protected": None
                if target.super_experts is None
                else [target.super_experts.get(layer, ()) for layer in layers],
            }
        )
    return {
        "layers": list(layers),
        "num_experts": num_experts,
        "domains": args.domains,
        "never_routed": [args.never_routed.get(layer, ()) for layer in layers],
        "distances": scaled(np.stack(distances), "uint8"),
        "use": scaled(np.stack(use), "uint16"),
        "saliency": scaled(np.stack(saliency), "uint16"),
        "plans": plans.values,
        "dendrograms": dendrograms.values,
        "targets": targets,
    }


class _Shared:
    """A list in which equal values stand once."""

    def __init__(self) -> None:
        self.values: list[Values] = []
        self._places: dict[str, int] = {}

    def place(self, value: Values) -> int:
        """Place of a value in the list."""
        text = json.dumps(value)
        if text not in self._places:
            self._places[text] = len(self.values)
            self.values.append(value)
        return self._places[text]


def _distances(parts: Sequence[LayerEvidence]) -> Array:
    """Euclidean distances [P] of the experts' mean outputs over the tokens of all domains, un-gated, in scipy's condensed
    order."""
    sum_EH = np.sum([part["output_sum"] for part in parts], axis=0)
    return pdist(sum_EH / max(1, sum(part.num_output_tokens for part in parts)), "euclidean")


def _dendrograms(folder: Path, layers: Sequence[int]) -> Values:
    """Merges and their distances of every layer, E - 1 each."""
    linkage_LPZ = np.stack([read_dendrogram(dendrogram_file(folder, layer)) for layer in layers])
    return {
        "merges": packed(linkage_LPZ[:, :, :2], "uint16"),
        "heights": scaled(linkage_LPZ[:, :, 2].clip(min=0), "uint16"),
    }


def _plans(folder: Path, layers: Sequence[int]) -> Values:
    """Slots to which experts are sent, [L, E], -1 where to none; and the members of all slots in the order of the layers,
    `starts` saying where each layer begins: slot, expert, weight, and the number of its neurons (65535: all)."""
    slots, starts, members = [], [0], []
    for layer in layers:
        plan = read_plan(plan_file(folder, layer))
        slots.append(plan.slot_E)
        members += _members(plan)
        starts.append(len(members))
    slot_M, expert_M, neurons_M, weight_M = (np.array(column) for column in zip(*members, strict=True))
    return {
        "slots": packed(np.stack(slots), "int16"),
        "starts": starts,
        "member_slots": packed(slot_M, "uint16"),
        "member_experts": packed(expert_M, "uint16"),
        "member_neurons": packed(neurons_M, "uint16"),
        "member_weights": packed(np.round(weight_M, 4), "float32"),
    }


_ALL_NEURONS = 65535


def _members(plan: LayerPlan) -> list[tuple[int, int, int, float]]:
    return [
        (number, member.expert, _ALL_NEURONS if member.neurons is None else len(member.neurons), member.weight)
        for number, slot in enumerate(plan.slots)
        for member in slot.members
    ]
