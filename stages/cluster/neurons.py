"""Which neurons of a cluster's experts belong together: permutations onto a reference expert, and groups that become one.

Dimensions: F neurons of an expert, N neurons of all members of a cluster, S sampled tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from stages.cluster.neuron_memory import zip_bytes
from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan, Member, Slot
from stages.contracts.settings import NEURON_COLUMN, Merging

REPEATED = 0.1
"""Factor on the correlations of a neuron each time that it is joined (the authors' value in HC-SMoE and M-SMoE)."""
_CONSTANT = 1e-12
"""A neuron whose variance is this share of its mean square, or less, is constant on the sample."""

Similarity = Callable[[int, int], Array]
"""Of the neurons of two experts, [F, F]: of the first along the first axis."""


def standardised(activation_SN: Array) -> Array:
    """Columns float32 [S, N] with mean 0 and norm 1, whose inner products are Pearson's correlations; 0 for a constant one."""
    centred_SN = activation_SN - activation_SN.mean(0, dtype=np.float64)
    square_N = np.square(centred_SN).sum(0)
    is_constant_N = square_N <= _CONSTANT * np.square(activation_SN.astype(np.float64)).sum(0)
    scale_N = np.divide(1, np.sqrt(square_N), out=np.zeros_like(square_N), where=~is_constant_N)
    unit_SN: Array = (centred_SN * scale_N).astype(np.float32)
    return unit_SN


def permutation(similarity_FF: Array) -> tuple[int, ...]:
    """The neuron of the second expert that stands for each of the first, so that the total similarity is largest: the
    assignment problem (Ainsworth et al., arXiv:2209.04836, section 3)."""
    return tuple(linear_sum_assignment(similarity_FF, maximize=True)[1].tolist())


def most_similar(similarity_FF: Array) -> tuple[int, ...]:
    """For each neuron of the second expert, the most similar one of the first; of equally similar ones the first."""
    return tuple(similarity_FF.argmax(0).tolist())


def zipped(similarity_NN: Array, num_places: int) -> Array:
    """Place int64 [N] of every neuron once the most similar two have been joined again and again, until `num_places` are left.

    The similarity of a joined neuron to another one is the lesser of its two parts', times REPEATED (ZipIt, arXiv:2305.03053,
    with the update of HC-SMoE's authors). Of equally similar pairs the first joins. Places are numbered by their first neuron.
    similarity_NN: symmetric; it is overwritten.
    """
    np.fill_diagonal(similarity_NN, -np.inf)
    best_N, partner_N = similarity_NN.max(1), similarity_NN.argmax(1)
    first_N = np.arange(len(similarity_NN))
    for _ in range(len(similarity_NN) - num_places):
        stays = int(best_N.argmax())
        goes = int(partner_N[stays])
        joined_N = REPEATED * np.minimum(similarity_NN[stays], similarity_NN[goes])
        similarity_NN[stays] = similarity_NN[:, stays] = joined_N
        similarity_NN[goes] = similarity_NN[:, goes] = best_N[goes] = -np.inf
        first_N[first_N == goes] = stays
        is_nearer_N = (joined_N > best_N) | ((joined_N == best_N) & (stays < partner_N))
        is_stale_N = (partner_N == stays) | (partner_N == goes)
        best_N[is_nearer_N], partner_N[is_nearer_N] = joined_N[is_nearer_N], stays
        for neuron in {stays, *np.flatnonzero(is_stale_N & np.isfinite(best_N)).tolist()}:
            partner_N[neuron] = similarity_NN[neuron].argmax()
            best_N[neuron] = similarity_NN[neuron, partner_N[neuron]]
    return np.unique(first_N, return_inverse=True)[1]


def permuted(slot: Slot, reference: int, similarity: Similarity) -> Slot:
    """A slot whose members' neurons stand in the order of the reference's. A member that needs no other order has none."""
    members = []
    for member in slot.members:
        order = permutation(similarity(reference, member.expert)) if member.expert != reference else ()
        members.append(replace(member, neurons=None if order == tuple(range(len(order))) else order))
    return replace(slot, members=tuple(members))


def joined_to(slot: Slot, reference: int, similarity: Similarity, num_neurons: int) -> Slot:
    """A slot in which each neuron of a member joins the reference's most similar one: Fix-Dom (HC-SMoE, arXiv:2410.08589)."""
    return _placed(
        slot,
        [
            tuple(range(num_neurons)) if member.expert == reference else most_similar(similarity(reference, member.expert))
            for member in slot.members
        ],
    )


def _placed(slot: Slot, places: Sequence[tuple[int, ...]]) -> Slot:
    pairs = zip(slot.members, places, strict=True)
    return replace(slot, members=tuple(Member(member.expert, member.weight, places=some) for member, some in pairs))


@dataclass(frozen=True)
class Activations:
    """Correlations of neurons over the sampled tokens of a layer's evidence, unit_ESF as `standardised` makes it."""

    evidence: LayerEvidence

    def _unit(self, expert: int) -> Array:
        return standardised(self.evidence[NEURON_COLUMN][expert])

    def between(self, one: int, other: int) -> Array:
        """Correlations [F, F] of the neurons of two experts."""
        return self._unit(one).T @ self._unit(other)

    def zipped(self, slot: Slot, reference: int) -> Slot:
        """A slot whose members' neurons are joined by `zipped`, those of the reference first."""
        experts = [reference, *(member.expert for member in slot.members if member.expert != reference)]
        unit_SN = np.concatenate([self._unit(expert) for expert in experts], axis=1)
        place_EF = zipped(unit_SN.T @ unit_SN, unit_SN.shape[1] // len(experts)).reshape(len(experts), -1)
        places = dict(zip(experts, place_EF.tolist(), strict=True))
        return _placed(slot, [tuple(places[member.expert]) for member in slot.members])


def with_neurons(
    plan: LayerPlan, evidence: LayerEvidence, merging: Merging, weights: Similarity | None, max_bytes: int
) -> LayerPlan:
    """A plan whose slots of several members say which neurons belong together, as `merging` asks for. The reference of a slot
    is its most used member, of equally used ones the first.

    weights: similarity of neurons by their weights, if `merging.align` names it. Raises InputError for a cluster whose
    correlations take more than max_bytes.
    """
    if not merging.matches_neurons:
        return plan
    used_E, activations = evidence["num_routed_tokens"], Activations(evidence)

    def matched(number: int, slot: Slot) -> Slot:
        reference = min((member.expert for member in slot.members), key=lambda expert: (-used_E[expert], expert))
        if merging.method == "zipit":
            num_bytes = zip_bytes(len(slot.members), evidence[NEURON_COLUMN].shape[2])
            if num_bytes > max_bytes:
                raise InputError(
                    f"layer {plan.layer}: merging.method is zipit, whose correlations of a cluster of {len(slot.members)} "
                    f"experts take {num_bytes:,} bytes, more than resources.worker_memory {max_bytes:,}; raise it, keep more "
                    "experts, or set merging.method to fix_dominant"
                )
            return activations.zipped(slot, reference)
        if merging.method == "fix_dominant":
            return joined_to(slot, reference, activations.between, evidence[NEURON_COLUMN].shape[2])
        return permuted(slot, reference, weights or activations.between)

    slots = [matched(number, slot) if len(slot.members) > 1 else slot for number, slot in enumerate(plan.slots)]
    return replace(plan, slots=tuple(slots))
