"""How certain a layer's clustering is, known under sampling: standard errors of mean outputs, and the stability of cuts.

Dimensions: E experts, K numbers of clusters from 1 to E.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, read_table, write_table
from stages.io.files import WrittenFile

_ERRORS = pa.schema(
    [pa.field("expert", pa.int32(), False), pa.field("relative_standard_error", pa.float64(), False)],
    metadata={
        "table": "one expert a row",
        "relative_standard_error": "standard error of the expert's mean output over the norm of that mean; no unit",
    },
)

_STABILITY = pa.schema(
    [
        pa.field("num_clusters", pa.int32(), False),
        pa.field("equal_share", pa.float64(), False),
        pa.field("mean_adjusted_rand_index", pa.float64(), False),
    ],
    metadata={
        "table": "for every K from 1 to E, the clusterings of random halves of the groups against that of all",
        "equal_share": "share of halves whose labels are those of all groups",
        "mean_adjusted_rand_index": "1 for equal clusterings, 0 on average for unrelated ones",
    },
)


@dataclass(frozen=True)
class CutStability:
    """How the clusterings of random halves of the groups agree with that of all groups, for one number of clusters."""

    num_clusters: int
    equal_share: float
    mean_adjusted_rand_index: float


@dataclass(frozen=True)
class Stability:
    """The same for every number of clusters: equal_share_K and mean_adjusted_rand_index_K start at K = 1."""

    equal_share_K: Array
    mean_adjusted_rand_index_K: Array

    def of(self, num_clusters: int) -> CutStability:
        """Stability of the cut to num_clusters."""
        index = num_clusters - 1
        return CutStability(num_clusters, float(self.equal_share_K[index]), float(self.mean_adjusted_rand_index_K[index]))


def write_errors(path: Path, errors_E: Array) -> WrittenFile:
    """Write the relative standard errors of one layer's mean outputs."""
    columns = {"expert": np.arange(len(errors_E), dtype=np.int32), "relative_standard_error": errors_E}
    return write_table(path, columns, _ERRORS)


def read_errors(path: Path) -> Array:
    """Read the relative standard errors [E] of one layer's mean outputs."""
    return read_table(path)["relative_standard_error"].to_numpy()  # type: ignore[no-any-return]


def write_stability(path: Path, stability: Stability) -> WrittenFile:
    """Write the stability of one layer's cuts."""
    columns = {
        "num_clusters": np.arange(1, len(stability.equal_share_K) + 1, dtype=np.int32),
        "equal_share": stability.equal_share_K,
        "mean_adjusted_rand_index": stability.mean_adjusted_rand_index_K,
    }
    return write_table(path, columns, _STABILITY)


def read_stability(path: Path) -> Stability:
    """Read the stability of one layer's cuts."""
    table = read_table(path)
    return Stability(table["equal_share"].to_numpy(), table["mean_adjusted_rand_index"].to_numpy())
