"""The sums of one layer over one token shard. Deleted once they have been added up.

Dimensions: C cells.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, list_column, read_lists, read_table, write_table
from stages.io.files import WrittenFile


@dataclass(frozen=True)
class PartialSums:
    """Sums by name of the collector, then of the sum; their first axis is that of the experts.

    num_tokens: all tokens. num_unrouted_C: tokens of each cell that sums over un-routed experts run over.
    """

    layer: int
    num_tokens: int
    num_unrouted_C: Array
    sums: Mapping[str, Mapping[str, Array]]


def write_partial_sums(path: Path, part: PartialSums) -> WrittenFile:
    """Write the sums of one layer over one token shard, one expert a row."""
    arrays = {f"{name}.{key}": values for name, sums in part.sums.items() for key, values in sums.items()}
    flat = {name: values.reshape(len(values), -1) for name, values in arrays.items()}
    num_experts = len(next(iter(flat.values())))
    columns = {
        "num_unrouted_tokens": list_column(np.tile(part.num_unrouted_C, (num_experts, 1)), pa.int64()),
        **{name: list_column(values, pa.from_numpy_dtype(values.dtype)) for name, values in flat.items()},
    }
    metadata = {
        "table": "sums of one MoE layer over one token shard, one expert a row; columns are named collector.sum",
        "layer": str(part.layer),
        "num_tokens": str(part.num_tokens),
        "num_unrouted_tokens": "[C] tokens of each cell that sums over un-routed experts run over",
        "shapes": json.dumps({name: values.shape[1:] for name, values in arrays.items()}),
    }
    schema = pa.schema([pa.field(name, column.type, False) for name, column in columns.items()], metadata=metadata)
    return write_table(path, columns, schema)


def read_partial_sums(path: Path) -> PartialSums:
    """Read the sums of one layer over one token shard."""
    table = read_table(path)
    metadata = table.schema.metadata
    sums: dict[str, dict[str, Array]] = {}
    for column, shape in json.loads(metadata[b"shapes"]).items():
        collector, _, name = column.partition(".")
        sums.setdefault(collector, {})[name] = read_lists(table, column).reshape(len(table), *shape)
    num_unrouted_C = read_lists(table, "num_unrouted_tokens")[0]
    return PartialSums(int(metadata[b"layer"]), int(metadata[b"num_tokens"]), num_unrouted_C, sums)
