"""An order of experts that does not depend on their numbers, for methods that draw random numbers.

Dimensions: E experts, D feature size.
"""

from collections.abc import Callable

import numpy as np

from stages.contracts.arrow import Array


def by_content(feature_ED: Array) -> Array:
    """Experts [E], sorted by the norms of their features, then by the features. Equal ones keep their order.

    Norms first, because some features are known up to a rotation only.
    """
    return np.lexsort((*feature_ED.T[::-1], np.linalg.norm(feature_ED, axis=1)))


def in_order_of(feature_ED: Array, label: Callable[[Array], Array]) -> Array:
    """Labels [E] that `label` gives to experts sorted by content, handed back in their own order and made canonical.

    So another numbering of the experts gives the same clusters, whatever the seed.
    """
    order_E = by_content(feature_ED)
    labels_E = np.empty(len(order_E), dtype=np.int64)
    labels_E[order_E] = label(feature_ED[order_E])
    return canonical(labels_E)


def canonical(labels_E: Array) -> Array:
    """Labels int32 [E] of the same clusters, numbered by their smallest member."""
    _, first, inverse = np.unique(labels_E, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int32)
