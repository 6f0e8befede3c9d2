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
"""Vectors of the experts, [E, D] or [E, E], whose distances are compared; each function says where it is from."""
DISTANCES: dict[str, Callable[[Array], Array]] = {
    "euclidean": lambda feature_ED: spatial.pdist(feature_ED, "euclidean"),
    "cosine": lambda feature_ED: spatial.pdist(feature_ED, "cosine"),
}
"""Of each pair: ||x_i - x_j||, or 1 - x_i . x_j / (||x_i|| ||x_j||), which a vector of zeros does not have."""
LINKAGES: dict[str, Callable[[Array], Array]] = {
    "average": hierarchy.average,
    "single": hierarchy.single,
    "complete": hierarchy.complete,
    "ward": hierarchy.ward,
}
"""Distance of clusters A and B, of which the nearest two are merged (scipy's): the mean over pairs of A x B, the least, the
largest, or sqrt(2 |A| |B| / (|A| + |B|)) times that of their centroids (Ward, 1963), for euclidean distances alone."""


def check_finite(feature_ED: Array, place: str) -> None:
    """Raise InputError naming an expert whose feature is not finite."""
    for expert, row in enumerate(feature_ED):
        if not np.isfinite(row).all():
            raise InputError(
                f"{place}: the feature of expert {expert} is not finite; its weights hold NaN or infinity: "
                f"download the checkpoint again"
            )


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
