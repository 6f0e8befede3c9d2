"""How much of each source expert goes into a merged one.

Dimensions: E experts, K clusters. labels_E[e] is the cluster of expert e; a row of shares sums to one over a cluster.
"""

from collections.abc import Callable

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence

Shares = list[tuple[int, float]]


def _frequency(evidence: LayerEvidence) -> Array:
    return evidence["num_routed_tokens"].astype(np.float64)


def _equal(evidence: LayerEvidence) -> Array:
    return np.ones(len(evidence["num_routed_tokens"]))


# Weight of each expert within its cluster. "frequency" is HC-SMoE's merge (arXiv:2410.08589, eq. 6).
METHODS: dict[str, Callable[[LayerEvidence], Array]] = {"frequency": _frequency, "average": _equal}


def shares_by_cluster(weights_E: Array, labels_E: Array) -> tuple[list[Shares], list[int]]:
    """For each cluster its members, ascending, with their shares; and the clusters whose weights are all zero.

    Such a cluster (never routed to) gets equal shares; the report names it.
    """
    shares, unweighted = [], []
    for cluster in range(int(labels_E.max()) + 1):
        members = np.flatnonzero(labels_E == cluster)
        total = weights_E[members].sum()
        if total == 0:
            unweighted.append(cluster)
        share = weights_E[members] / total if total > 0 else np.full(len(members), 1 / len(members))
        shares.append([(int(member), float(value)) for member, value in zip(members, share, strict=True)])
    return shares, unweighted


def _dominant(evidence: LayerEvidence, labels_E: Array) -> list[Shares]:
    used = evidence["num_routed_tokens"]
    return [
        [(min(members, key=lambda expert: (-used[expert], expert)), 1.0)]
        for members in (np.flatnonzero(labels_E == cluster).tolist() for cluster in range(int(labels_E.max()) + 1))
    ]


# How a stock export combines the router rows (and biases) of a cluster: usage-weighted mean, mean, or most used member's.
ROUTERS: dict[str, Callable[[LayerEvidence, Array], list[Shares]]] = {
    "frequency": lambda evidence, labels_E: shares_by_cluster(_frequency(evidence), labels_E)[0],
    "average": lambda evidence, labels_E: shares_by_cluster(_equal(evidence), labels_E)[0],
    "dominant": _dominant,
}
