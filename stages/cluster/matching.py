"""Groups of experts whose least important neurons find no room.

Dimensions: E experts, F neurons of an expert.
"""

from collections.abc import Sequence

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.pairing import grouped_in_runs


def lost(importance_EF: Array, group: Sequence[int]) -> float:
    """Importance of the neurons for which a slot of F neurons has no room: all but the F most important of the group."""
    ranked = np.sort(importance_EF[list(group)].reshape(-1))
    return float(ranked[: -importance_EF.shape[1]].sum())


def paired(importance_EF: Array, num_slots: int, num_groups: int = 1) -> Array:
    """Labels int32 [E] of `num_slots` groups by repeated pairing, within num_groups runs of equally many experts, each with as
    many slots. Importance is taken as a share of the run's sum.
    """
    runs = np.split(importance_EF, num_groups)
    relative_EF = np.concatenate([run_EF / max(float(run_EF.sum()), np.finfo(np.float64).tiny) for run_EF in runs])
    groups = grouped_in_runs(len(importance_EF), num_slots, num_groups, lambda group: lost(relative_EF, group))
    labels_E = np.empty(len(importance_EF), dtype=np.int32)
    for number, group in enumerate(groups):
        labels_E[group] = number
    return labels_E
