"""k-means.

Dimensions: E points, D their size, K clusters.
"""

import warnings

import numpy as np
from scipy.cluster.vq import kmeans2

from stages.contracts.arrow import Array

_ITERATIONS = 100


def clusters(point_ED: Array, num_clusters: int, chance: np.random.Generator) -> Array:
    """Labels [E] of exactly `num_clusters` clusters: Lloyd's algorithm from k-means++ centres.

    Where a cluster is left empty (equal points, or bad luck), it gets the point that lies farthest from its centre, of equally
    far ones the first, as long as that is not alone.
    """
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):  # equal points are at no distance from any centre
        warnings.simplefilter("ignore", UserWarning)  # says that a cluster is empty
        center_KD, labels_E = kmeans2(point_ED, num_clusters, iter=_ITERATIONS, minit="++", rng=chance)
    distance_E = np.linalg.norm(point_ED - center_KD[labels_E], axis=1)
    for empty in sorted(set(range(num_clusters)) - set(labels_E.tolist())):
        is_alone_E = np.bincount(labels_E, minlength=num_clusters)[labels_E] == 1
        farthest = int(np.where(is_alone_E, -1.0, distance_E).argmax())
        labels_E[farthest], distance_E[farthest] = empty, 0.0
    return labels_E
