"""Groups of experts around centres.

Dimensions: D feature size, E experts.
"""

from collections.abc import Sequence

import numpy as np

from stages.cluster.order import canonical
from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence


def _cosines_of_gram(gram_EE: Array) -> Array:
    """Cosines [E, E] of vectors with these inner products; 0 for a vector that is zero."""
    norm_E = np.sqrt(np.diag(gram_EE))
    scale_EE = np.outer(norm_E, norm_E)
    return np.divide(gram_EE, scale_EE, out=np.zeros_like(gram_EE), where=scale_EE > 0)


def logit_cosines(evidence: LayerEvidence) -> Array:
    """Cosines [E, E] of the experts' router logits, each a vector over all tokens."""
    return _cosines_of_gram(evidence["router_logit_gram"])


def cosines(feature_ED: Array) -> Array:
    """Cosines [E, E] of features."""
    return _cosines_of_gram(feature_ED @ feature_ED.T)


def around(centers: Sequence[int], similarity_EE: Array) -> Array:
    """Labels [E]: every expert joins the most similar centre, a centre itself; of equally similar ones the first listed."""
    chosen_E = similarity_EE[:, centers].argmax(1)
    chosen_E[list(centers)] = np.arange(len(centers))
    return canonical(chosen_E)


def absorbed(centers: Sequence[int], similarity_EE: Array, most: int) -> Array:
    """Labels [E]: centres choose in turn, each up to `most` of the experts that are left, the most similar first.

    An expert that no centre has chosen joins the most similar one.
    """
    labels_E = similarity_EE[:, centers].argmax(1)
    labels_E[list(centers)] = np.arange(len(centers))
    free = set(range(len(labels_E))) - set(centers)
    for number, center in enumerate(centers):
        chosen = sorted(free, key=lambda expert: (-similarity_EE[center, expert], expert))[:most]
        labels_E[chosen] = number
        free.difference_update(chosen)
    return canonical(labels_E)
