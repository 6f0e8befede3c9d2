"""Which tensors each output file holds, from shapes alone: no layer plan is needed to know names, sizes and files.

An output file keeps what its source file keeps: slot c takes the name, and so the file, of expert c of the source. A packed
tensor is several tensors here, each with a name and a file of its own. With r = E the files are the source's own, byte for
byte. A file larger than the bound is split.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.checkpoint.folder import SINGLE_FILE
from stages.checkpoint.headers import DTYPE_BITS
from stages.checkpoint.quantised import SOURCE_DTYPE, VALUE_DTYPES
from stages.checkpoint.schemes import SCALES, WEIGHT, ZERO_POINTS
from stages.contracts.errors import InputError
from stages.contracts.tensors import TensorRow


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the target.

    rule: "copy" | "expert" (one slot) | "fused_expert" | "router" (rows combined) | "expert_map".
    slot: for "expert", the slot that it is of. source: row of the source tensor in `tensors.arrow`; that of its values where a
    packed tensor is written as plain numbers. written: shape of one expert's values, for experts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rule: str
    layer: int | None
    source: TensorRow
    slot: int | None = None
    written: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return (math.prod(self.shape) * DTYPE_BITS[self.dtype] + 7) // 8


@dataclass(frozen=True)
class OutputFile:
    """One weight file of the target: its final name and its tensors in the order of their bytes."""

    name: str
    source_file: str
    tensors: tuple[OutputTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def _output_tensors(
    row: TensorRow,
    num_merged: Mapping[int, int],
    export_format: str,
    value_dtype: str,
    mtp: str,
    num_neurons: int | None,
) -> list[OutputTensor]:
    """What becomes of a tensor of the source. mtp: what becomes of layers that predict further tokens: copy, merge or drop."""
    if row.scheme and value_dtype != SOURCE_DTYPE:
        if row.part != WEIGHT:
            return []
        row = row.of_values(VALUE_DTYPES[value_dtype])
    values = _narrowed(row, num_neurons)
    shape = _part_shape(row, values) if row.part else values
    name, layer, role, dtype = row.name, row.layer, row.role, row.dtype
    if role == "mtp":
        if mtp == "drop":
            return []
        role = row.like if mtp == "merge" and row.like else "copy"
    if role == "copy" or (role == "router" and export_format == "tied"):
        return [OutputTensor(name, dtype, shape, "copy", layer, row)]
    assert layer is not None, f"{name}: experts and routers belong to a layer"
    num_slots = num_merged[layer] if layer in num_merged else num_merged[max(num_merged)]
    if role == "expert":
        assert row.expert is not None, name
        if row.expert >= num_slots:
            return []
        return [OutputTensor(name, dtype, shape, "expert", layer, row, slot=row.expert, written=values)]
    axis = row.expert_axis
    assert axis is not None, name
    shorter = (*shape[:axis], num_slots, *shape[axis + 1 :])
    return [OutputTensor(name, dtype, shorter, role, layer, row, written=values[:axis] + values[axis + 1 :])]


def _narrowed(row: TensorRow, num_neurons: int | None) -> tuple[int, ...]:
    """The shape of values whose experts have so many neurons; None: as it is."""
    axis, shape = row.neuron_axis, row.values_shape
    if num_neurons is None or axis is None:
        return shape
    axis += row.role == "fused_expert"  # the experts come first; merge refuses any other order
    places = num_neurons if row.neuron_order == "single" else 2 * num_neurons
    return (*shape[:axis], places, *shape[axis + 1 :])


def _part_shape(row: TensorRow, values: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a part of a packed tensor whose values have another shape: its rows and columns shrink with those of the
    values."""
    shape, first = list(row.shape), len(values) - 2
    if row.part not in (WEIGHT, SCALES, ZERO_POINTS):
        return row.shape
    axes = (first + 1, first) if row.scheme == "mxfp4" else (first, first + 1)  # stored transposed
    for axis, values_axis in enumerate(axes, first):
        old, new = row.values_shape[values_axis], values[values_axis]
        is_shared = axis >= len(shape) or (
            shape[axis] == 1 and row.scheme in ("fp8", "int_bytes")
        )  # one scale, however many values it has
        if old == new or is_shared:
            continue
        if shape[axis] * new % old:
            raise InputError(
                f"tensor {row.name}: {new} of {old} neurons do not divide into the blocks of {row.scheme}; set "
                f"refit.width_multiple to a multiple of them, or export.dtype to bfloat16"
            )
        shape[axis] = shape[axis] * new // old
    return tuple(shape)


def _expert_map(row: TensorRow, num_experts: int) -> OutputTensor:
    module = row.template.split(".{}.", 1)[0] if row.template is not None else row.parameter.rsplit(".", 1)[0]
    return OutputTensor(f"{module}.expert_map", "I64", (num_experts,), "expert_map", row.layer, row)


def output_files(
    rows: Sequence[TensorRow],
    num_experts: int,
    num_merged: Mapping[int, int],
    export_format: str,
    max_file_bytes: int,
    value_dtype: str = SOURCE_DTYPE,
    merges_mtp: bool = False,
    num_neurons: int | None = None,
) -> list[OutputFile]:
    """The target's files, none empty, in the order of the source's.

    num_merged: merged experts r of each MoE layer. value_dtype: how the values of a quantised tensor are written, a value of
    `export.dtype`. num_neurons: of an expert, where it keeps fewer than it has. MTP layers are kept where every layer keeps all
    of its experts, and these all of their neurons; and with merges_mtp, with as many experts as the last MoE layer, if all of
    these keep all of their neurons. Tensors of wider dtypes come first in a file, so that all are aligned.

    Raises InputError where fewer neurons do not divide into the blocks of a scheme.
    """
    groups: dict[str, list[OutputTensor]] = {}
    mapped: set[int | None] = set()
    is_whole = all(count == num_experts for count in num_merged.values())
    mtp = "copy" if is_whole else "merge" if merges_mtp else "drop"
    if num_neurons is not None:
        mtp = "drop"
    for row in rows:
        group = groups.setdefault(row.file, [])
        group.extend(_output_tensors(row, num_merged, export_format, value_dtype, mtp, num_neurons))
        if export_format == "tied" and row.role in ("expert", "fused_expert") and row.layer not in mapped:
            mapped.add(row.layer)
            group.append(_expert_map(row, num_experts))
    parts: list[tuple[str, list[OutputTensor]]] = []
    for file, group in groups.items():
        part: list[OutputTensor] = []
        num_bytes = 0
        for tensor in sorted(group, key=lambda tensor: -DTYPE_BITS[tensor.dtype]):
            if part and num_bytes + tensor.num_bytes > max_file_bytes:
                parts.append((file, part))
                part, num_bytes = [], 0
            part.append(tensor)
            num_bytes += tensor.num_bytes
        if part:
            parts.append((file, part))
    return [OutputFile(_file_name(number, len(parts)), file, tuple(tensors)) for number, (file, tensors) in enumerate(parts, 1)]


def _file_name(number: int, count: int) -> str:
    return SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
