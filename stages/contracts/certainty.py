"""Uncertainty of a layer's evidence and clusterings, for runs whose un-routed means come from a sample of tokens.

Dimensions: E experts, K clusters.
"""

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


def write_errors(path: Path, relative_standard_error_E: Array) -> WrittenFile:
    """Write the relative standard error of every expert's mean output."""
    experts = np.arange(len(relative_standard_error_E), dtype=np.int32)
    return write_table(path, {"expert": experts, "relative_standard_error": relative_standard_error_E}, _ERRORS)


def read_errors(path: Path) -> list[float]:
    """Relative standard errors of all experts."""
    return read_table(path)["relative_standard_error"].to_pylist()  # type: ignore[no-any-return]


def write_stability(path: Path, equal_share_K: Array, mean_adjusted_rand_index_K: Array) -> WrittenFile:
    """Write the stability of the clusterings into 1, 2, ... E clusters."""
    columns = {
        "num_clusters": np.arange(1, len(equal_share_K) + 1, dtype=np.int32),
        "equal_share": equal_share_K,
        "mean_adjusted_rand_index": mean_adjusted_rand_index_K,
    }
    return write_table(path, columns, _STABILITY)


def read_stability(path: Path, num_clusters: int) -> dict[str, float]:
    """Stability of the clustering into num_clusters clusters, by column name."""
    return read_table(path).slice(num_clusters - 1, 1).to_pylist()[0]  # type: ignore[no-any-return]
