"""Distances of a layer's experts by their weights.

Dimensions: E experts.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, list_column, read_lists, read_table, write_table
from stages.io.files import WrittenFile

_MEANING = "row e: euclidean distances of expert e's weights and biases, as one vector, from those of every expert"


def write_distances(path: Path, distance_EE: Array) -> WrittenFile:
    """Write the distances float64 [E, E] of a layer's experts."""
    field = pa.field("distance", pa.list_(pa.float64(), distance_EE.shape[1]), False)
    schema = pa.schema([field], metadata={"table": "one expert a row, in order", "distance": _MEANING})
    return write_table(path, {"distance": list_column(np.ascontiguousarray(distance_EE), pa.float64())}, schema)


def read_distances(path: Path) -> Array:
    """Read a file of `write_distances`."""
    return read_lists(read_table(path), "distance")
