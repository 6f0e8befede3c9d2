"""A token shard: token ids, one sequence per row.

Dimensions: S sequences, T tokens.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, read_table, write_table
from stages.io.files import WrittenFile

_SCHEMA = pa.schema(
    [pa.field("token_ids", pa.list_(pa.int32()), False)],
    metadata={"table": "one sequence a row", "token_ids": "[T] ids of the model's vocabulary"},
)


def write_tokens(path: Path, token_ids_ST: Array) -> WrittenFile:
    """Write token ids [S, T]."""
    return write_table(path, {"token_ids": [row.tolist() for row in token_ids_ST]}, _SCHEMA)


def read_tokens(path: Path) -> Array:
    """Token ids int64 [S, T]."""
    return np.array(read_table(path)["token_ids"].to_pylist(), dtype=np.int64)
