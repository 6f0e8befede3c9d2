"""Agglomerative clustering of one layer's experts.

Dimensions: E experts, D feature size, K clusters. A linkage matrix Z [E-1, 4] is scipy's: left, right, distance, size.
"""

from collections.abc import Callable

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance as spatial

from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.evidence import LayerEvidence


def expert_output(evidence: LayerEvidence) -> Array:
    """Mean output [E, D] of every expert over all calibration tokens, or the sampled, un-gated (HC-SMoE, arXiv:2410.08589,
    eq. 4)."""
    return evidence["output_sum"] / evidence.num_output_tokens


def _vectors(gram_EE: Array) -> Array:
    """Vectors [E, E] with these inner products, so that their distances are those of what was multiplied.

    From the eigenvalues of the Gram matrix; those that rounding has made negative are zero.
    """
    values_E, vectors_EE = np.linalg.eigh(gram_EE)
    return vectors_EE * np.sqrt(values_E.clip(min=0))  # type: ignore[no-any-return]


def router_logits(evidence: LayerEvidence) -> Array:
    """Vectors [E, E] whose inner products are those of the experts' router logits over all tokens."""
    return _vectors(evidence["router_logit_gram"])


def weight(evidence: LayerEvidence) -> Array:
    """Vectors [E, E] whose inner products, and so distances, are those of the experts' flattened weights and biases."""
    return _vectors(evidence["weight_gram"])


def token_wise(evidence: LayerEvidence) -> Array:
    """Vectors [E, E] whose squared distances are the means over tokens of ||E_i(x) - E_j(x)||^2, routed or not, un-gated."""
    return _vectors(evidence["output_gram"] / evidence.num_output_tokens)


def gated_output(evidence: LayerEvidence) -> Array:
    """Mean output [E, D] over the tokens that are routed to an expert, weighted by their gates (REAM, arXiv:2604.04356); zero
    where there are none."""
    sum_ED, gate_E1 = evidence["gated_output_sum"], evidence["gate_sum"][:, None]
    return np.divide(sum_ED, gate_E1, out=np.zeros_like(sum_ED), where=gate_E1 != 0)


FEATURES: dict[str, Callable[[LayerEvidence], Array]] = {
    "expert_output": expert_output,
    "router_logits": router_logits,
    "gated_output": gated_output,
    "weight": weight,
    "token_wise": token_wise,
}
DISTANCES: dict[str, Callable[[Array], Array]] = {
    "euclidean": lambda feature_ED: spatial.pdist(feature_ED, "euclidean"),
    "cosine": lambda feature_ED: spatial.pdist(feature_ED, "cosine"),
}
LINKAGES: dict[str, Callable[[Array], Array]] = {
    "average": hierarchy.average,
    "single": hierarchy.single,
    "complete": hierarchy.complete,
    "ward": hierarchy.ward,
}


def check_finite(feature_ED: Array, place: str) -> None:
    """Raise InputError naming an expert whose feature is not finite."""
    for expert, row in enumerate(feature_ED):
        if not np.isfinite(row).all():
            raise InputError(f"{place}: the feature of expert {expert} is not finite; its weights hold NaN or infinity")


def link(feature_ED: Array, distance: str, linkage: str, place: str) -> Array:
    """Linkage matrix Z [E-1, 4] of the experts. Raises InputError naming an expert whose feature is not finite, or is zero
    where a distance is an angle."""
    check_finite(feature_ED, place)
    if distance == "cosine":
        for expert in np.flatnonzero(~feature_ED.any(axis=1)):
            raise InputError(
                f"{place}: the feature of expert {expert} is zero, so it has no angle to others (no token was sent to it?); "
                "set clustering.distance to euclidean"
            )
    return LINKAGES[linkage](DISTANCES[distance](feature_ED))


def cut(linkage_Z: Array, num_clusters: int) -> Array:
    """Labels [E] of the cut to exactly num_clusters: the first E-K merges of the dendrogram, replayed.

    Replayed, since `fcluster` returns fewer clusters than asked for when distances tie. Clusters are numbered by their
    smallest member.
    """
    num_experts = len(linkage_Z) + 1
    assert 1 <= num_clusters <= num_experts
    members: dict[int, list[int]] = {expert: [expert] for expert in range(num_experts)}
    for step in range(num_experts - num_clusters):
        left, right = int(linkage_Z[step, 0]), int(linkage_Z[step, 1])
        members[num_experts + step] = members.pop(left) + members.pop(right)
    labels = np.empty(num_experts, dtype=np.int32)
    for label, cluster in enumerate(sorted(members.values(), key=min)):
        labels[cluster] = label
    return labels


def all_cuts(linkage_Z: Array) -> Array:
    """Labels [K, E] of the cuts to 1, 2, ... E clusters."""
    return np.stack([cut(linkage_Z, k) for k in range(1, len(linkage_Z) + 2)])
