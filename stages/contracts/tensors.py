"""`tensors.arrow`: every tensor of a checkpoint, and what it is to the model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from stages.contracts.arrow import read_table, write_table
from stages.io.files import WrittenFile

_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), False),
        pa.field("file", pa.string(), False),
        pa.field("dtype", pa.string(), False),
        pa.field("shape", pa.list_(pa.int64()), False),
        pa.field("num_bytes", pa.int64(), False),
        pa.field("parameter", pa.string(), False),
        pa.field("layer", pa.int32()),
        pa.field("role", pa.string(), False),
        pa.field("expert", pa.int32()),
        pa.field("expert_axis", pa.int32()),
        pa.field("template", pa.string()),
        pa.field("scheme", pa.string(), False),
    ],
    metadata={
        "table": "tensors of a checkpoint, in the order of their bytes",
        "parameter": "name of the transformers parameter that this tensor becomes part of",
        "layer": "decoder layer, null outside of the layers",
        "role": "copy | expert (one expert's) | fused_expert (all experts') | router (rows by expert) | mtp (further tokens)",
        "expert": "index of the expert for role expert",
        "expert_axis": "axis of the experts for roles fused_expert and router",
        "template": "for role expert: the name with {} in place of the expert's index",
        "scheme": "fp8 | mxfp4 for a tensor quantised on disk, whose dtype, shape and num_bytes are those of its values",
    },
)


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of a checkpoint; the metadata of the file says what its fields mean."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    parameter: str
    layer: int | None
    role: str
    expert: int | None
    expert_axis: int | None
    template: str | None
    scheme: str


def write_tensors(path: Path, rows: Iterable[TensorRow]) -> WrittenFile:
    """Write the tensors of a checkpoint in the order of its files and their bytes."""
    listed = list(rows)
    return write_table(path, {name: [getattr(row, name) for row in listed] for name in _SCHEMA.names}, _SCHEMA)


def read_tensors(path: Path) -> list[TensorRow]:
    """Read the tensors of a checkpoint."""
    columns = read_table(path).to_pydict()
    columns["shape"] = map(tuple, columns["shape"])
    return [TensorRow(*values) for values in zip(*(columns[name] for name in _SCHEMA.names), strict=True)]
