"""How much of each expert goes into the expert that its cluster becomes, and into the router row.

Dimensions: E experts. labels_E[e] is the cluster of expert e; the weights of a cluster sum to one.
"""

from collections.abc import Callable

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence

Weighted = list[tuple[int, float]]
"""Members of a cluster, ascending, with their weights."""


def _frequency(evidence: LayerEvidence) -> Array:
    return evidence["num_routed_tokens"].astype(np.float64)


def _equal(evidence: LayerEvidence) -> Array:
    return np.ones(evidence.num_experts)


WEIGHTS: dict[str, Callable[[LayerEvidence], Array]] = {"frequency": _frequency, "average": _equal}
"""Weight of each expert, before a cluster's are made to sum to one. "frequency" is HC-SMoE's (arXiv:2410.08589, eq. 6)."""


def cluster_weights(weights_E: Array, labels_E: Array) -> tuple[list[Weighted], list[int]]:
    """Each cluster's members with their weights, and the clusters whose weights are all zero, whose members get equal ones."""
    weighted, unweighted = [], []
    for cluster in range(int(labels_E.max()) + 1):
        members = np.flatnonzero(labels_E == cluster)
        total = weights_E[members].sum()
        if total == 0:
            unweighted.append(cluster)
        weights = weights_E[members] / total if total > 0 else np.full(len(members), 1 / len(members))
        weighted.append([(int(member), float(weight)) for member, weight in zip(members, weights, strict=True)])
    return weighted, unweighted


def _dominant(evidence: LayerEvidence, labels_E: Array) -> list[Weighted]:
    used = evidence["num_routed_tokens"]
    return [
        [(min(members, key=lambda expert: (-used[expert], expert)), 1.0)]
        for members in (np.flatnonzero(labels_E == cluster).tolist() for cluster in range(int(labels_E.max()) + 1))
    ]


ROUTERS: dict[str, Callable[[LayerEvidence, Array], list[Weighted]]] = {
    "frequency": lambda evidence, labels_E: cluster_weights(_frequency(evidence), labels_E)[0],
    "average": lambda evidence, labels_E: cluster_weights(_equal(evidence), labels_E)[0],
    "dominant": _dominant,
}
"""How a stock export combines the router rows (and biases) of a cluster: usage-weighted mean, mean, or most used member's."""
