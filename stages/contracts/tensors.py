"""The table of a checkpoint's tensors (`tensors.arrow` of prepare)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
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
        pa.field("neuron_axis", pa.int32()),
        pa.field("neuron_order", pa.string(), False),
        pa.field("scheme", pa.string(), False),
        pa.field("part", pa.string(), False),
        pa.field("values", pa.string(), False),
        pa.field("values_template", pa.string()),
        pa.field("values_shape", pa.list_(pa.int64()), False),
        pa.field("like", pa.string(), False),
    ],
    metadata={
        "table": "tensors of a checkpoint as they are stored, in the order of their bytes",
        "parameter": "name of the transformers parameter that this tensor becomes part of",
        "layer": "decoder layer, null outside of the layers; where like is set, the number of the layer that predicts further "
        "tokens, counted on from the decoder layers",
        "role": "copy | expert (one expert's) | fused_expert (all experts') | router (rows by expert) | mtp (further tokens)",
        "expert": "index of the expert for role expert",
        "expert_axis": "axis of the experts for roles fused_expert and router",
        "template": "for role expert: the name with {} in place of the expert's index",
        "neuron_axis": "axis of the neurons (intermediate size) in one expert's part; null where no value belongs to a neuron",
        "neuron_order": "single | halves | interleaved: along that axis a neuron has one value, or two (gate and up), which "
        "stand all gates first or in turn; empty without a neuron axis",
        "scheme": "name of the scheme in which a tensor is packed (stages/checkpoint/schemes.py); empty for plain numbers",
        "part": "what of a packed tensor this is: its numbers (weight), its scales or another part of the scheme; empty for "
        "plain numbers",
        "values": "name of the tensor of values as the model has it; for plain numbers the name itself",
        "values_template": "the same with {} in place of the expert's index, for role expert",
        "values_shape": "shape of the values",
        "like": "for role mtp: expert | fused_expert | router where the tensor in the same place of the last MoE layer is one, "
        "with expert, template and expert_axis as there; else empty",
    },
)


@dataclass(frozen=True)
class TensorRow:
    """One tensor. The schema's metadata describes the fields."""

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
    neuron_axis: int | None
    neuron_order: str
    scheme: str
    part: str
    values: str
    values_template: str | None
    values_shape: tuple[int, ...]
    like: str

    def of_values(self, dtype: str) -> "TensorRow":
        """The row that the values of a packed tensor would have as plain numbers. dtype: safetensors name."""
        return replace(
            self, name=self.values, template=self.values_template, shape=self.values_shape, dtype=dtype, scheme="", part=""
        )


def mtp_layers(rows: Iterable[TensorRow]) -> list[int]:
    """Numbers of the layers with experts that predict further tokens, ascending."""
    return sorted({row.layer for row in rows if row.role == "mtp" and row.like and row.layer is not None})


def num_neurons(rows: Iterable[TensorRow]) -> int:
    """F, the neurons of an expert; the most of any layer."""
    sizes = [
        row.values_shape[row.neuron_axis + (row.expert_axis is not None)]
        for row in rows
        if row.neuron_axis is not None and row.neuron_order == "single"
    ]
    return max(sizes)


def write_tensors(path: Path, rows: Sequence[TensorRow]) -> WrittenFile:
    """Write rows in the order of their bytes in the checkpoint."""
    return write_table(path, {field.name: [getattr(row, field.name) for row in rows] for field in fields(TensorRow)}, _SCHEMA)


def read_tensors(path: Path) -> list[TensorRow]:
    """Read a file of `write_tensors`."""
    return [
        TensorRow(**{**row, "shape": tuple(row["shape"]), "values_shape": tuple(row["values_shape"])})
        for row in read_table(path).to_pylist()
    ]
