"""How much of each expert goes into the expert that its cluster becomes, or of its row into the router row.

Dimensions: E experts. labels_E[e] is the cluster of expert e; the weights of a cluster sum to one.
"""

from collections.abc import Callable

import numpy as np
from scipy.spatial.distance import pdist, squareform

from stages.cluster.linkage import expert_output
from stages.cluster.saliency import reap
from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence

Weighted = list[tuple[int, float]]
"""Members of a cluster that have a weight, ascending, with their weights."""


def clusters_of(labels_E: Array) -> list[list[int]]:
    """Members of each cluster, ascending."""
    return [np.flatnonzero(labels_E == cluster).tolist() for cluster in range(int(labels_E.max()) + 1)]


def shared_out(weights_E: Array, labels_E: Array) -> list[Weighted]:
    """Weights in proportion to `weights_E`, which are not negative; equal ones in a cluster where all of them are zero."""
    weighted = []
    for members in clusters_of(labels_E):
        total = weights_E[members].sum()
        weights = weights_E[members] / total if total > 0 else np.full(len(members), 1 / len(members))
        weighted.append([(member, float(weight)) for member, weight in zip(members, weights, strict=True)])
    return weighted


def _frequency(evidence: LayerEvidence, labels_E: Array) -> list[Weighted]:
    return shared_out(evidence["num_routed_tokens"].astype(np.float64), labels_E)


def _average(evidence: LayerEvidence, labels_E: Array) -> list[Weighted]:
    return shared_out(np.ones(evidence.num_experts), labels_E)


def _saliency(evidence: LayerEvidence, labels_E: Array) -> list[Weighted]:
    return shared_out(reap(evidence), labels_E)


def _dominant(evidence: LayerEvidence, labels_E: Array) -> list[Weighted]:
    used_E = evidence["num_routed_tokens"]
    return [[(min(members, key=lambda expert: (-used_E[expert], expert)), 1.0)] for members in clusters_of(labels_E)]


def _central(evidence: LayerEvidence, labels_E: Array) -> list[Weighted]:
    used_E, output_ED = evidence["num_routed_tokens"], expert_output(evidence)

    def medoid(members: list[int]) -> int:
        distance_M = squareform(pdist(output_ED[members])).sum(1)
        return min(zip(distance_M, -used_E[members], members, strict=True))[-1]

    return [[(medoid(members), 1.0)] for members in clusters_of(labels_E)]


COMBINATIONS: dict[str, Callable[[LayerEvidence, Array], list[Weighted]]] = {
    "frequency": _frequency,
    "average": _average,
    "saliency": _saliency,
    "dominant": _dominant,
    "central": _central,
    "fix_dominant": _average,
    "zipit": _average,
}
"""Rules of a merge and of stock router rows: by use (HC-SMoE, arXiv:2410.08589, eq. 6), equal, by REAP's saliency
(arXiv:2510.13999), the most used member alone, or the most central one: the medoid, whose mean output over all tokens has the
least sum of euclidean distances to its cluster's others (Kaufman and Rousseeuw, 1987); of two, which are equally central, the
more used one. What is merged by neurons has equal weights, and is no rule of rows."""


def unweighted_clusters(evidence: LayerEvidence, labels_E: Array, rule: str) -> set[int]:
    """Clusters whose members no token was sent to, under a rule that weighs by use: their members get equal weights."""
    if COMBINATIONS[rule] in (_average, _central):
        return set()
    used_E = evidence["num_routed_tokens"]
    return {number for number, members in enumerate(clusters_of(labels_E)) if not used_E[members].any()}
