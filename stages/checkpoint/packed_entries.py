"""Packed tensors of each scheme: which parts one has, and of which shapes, from headers alone.

Each function is given a tensor of packed numbers and returns the entry that represents its values. Parts that do not fit are an
error that names file and tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from stages.checkpoint.headers import Packing, TensorEntry
from stages.checkpoint.schemes import (
    GROUPS,
    INPUT_DIVISOR,
    INPUT_SCALE,
    SCALES,
    SHAPE,
    WEIGHT,
    ZERO_POINTS,
    Scheme,
)
from stages.contracts.errors import InputError
from stages.io.untrusted import shown

Raw = Mapping[str, TensorEntry]
"""Tensors on disk, by name."""
VALUE_DTYPE = "BF16"
"""Dtype in which the values of a packed tensor are listed. The setting `export.dtype` decides the dtype written."""
SCALE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
_FP8_SCALES = ("_scale_inv", "_scale")
_FP8_INPUTS = ("input_scale", "activation_scale")
_MXFP4_BLOCK, _NVFP4_BLOCK = 32, 16
_LOST = "download the checkpoint again"
_UNREAD = "use the checkpoint from before quantisation"


def _values(name: str, weight: TensorEntry, shape: Sequence[int], scheme: Scheme, parts: Raw) -> TensorEntry:
    packing = Packing(scheme, {WEIGHT: weight, **parts})
    entry = replace(weight, name=name, dtype=VALUE_DTYPE, shape=tuple(shape), packing=packing)
    return replace(entry, num_bytes=2 * entry.num_elements)


def _num_blocks(size: int, block: int) -> int:
    return -(-size // block)


def is_count(value: Any) -> bool:
    """Whether a value of a config is a positive integer that sizes can be multiplied by."""
    return type(value) is int and 0 < value < 1 << 40


def count(section: Mapping[str, Any], name: str, place: str) -> int:
    """A positive integer of a config. Raises InputError for anything else."""
    value = section.get(name)
    if not is_count(value):
        raise InputError(
            f"{place}: config.json: quantization_config: {name} is {shown(repr(value))}; it must be a positive integer: "
            f"restore the config"
        )
    return int(value)  # type: ignore[arg-type]


def _needed(raw: Raw, weight: TensorEntry, name: str, shape: Sequence[int], dtypes: Sequence[str], place: str) -> TensorEntry:
    """A part that a packed tensor needs. Raises InputError if it is missing or is not what it must be."""
    part = raw.get(name)
    if part is None:
        raise InputError(f"{place}/{weight.file}: tensor {weight.name} is {weight.dtype} but {name} is missing; {_LOST}")
    if part.dtype not in dtypes or (part.shape != tuple(shape) and not (tuple(shape) == (1,) and part.shape == ())):
        raise InputError(
            f"{place}/{part.file}: tensor {name} is {part.dtype} {list(part.shape)}; {weight.name} of shape "
            f"{list(weight.shape)} needs {list(shape)} of {', '.join(dtypes)}; download the checkpoint again"
        )
    return part


def fp8(raw: Raw, name: str, entry: TensorEntry, block: tuple[int, int] | None, scheme: Scheme, place: str) -> TensorEntry:
    """Values of FP8 numbers [..., R, C]. block: rows and columns of a scale; None for a scale of the tensor or of every row."""
    module = name.removesuffix("weight")
    scales = next((raw[name + suffix] for suffix in _FP8_SCALES if name + suffix in raw), None)
    if scales is None or len(entry.shape) < 2:
        raise InputError(f"{place}/{entry.file}: tensor {name} is {entry.dtype} but {name}{_FP8_SCALES[0]} is missing; {_LOST}")
    if scales.dtype not in SCALE_DTYPES:
        raise InputError(
            f"{place}/{scales.file}: tensor {scales.name} is {scales.dtype}; scales are one of {', '.join(SCALE_DTYPES)}; "
            f"{_UNREAD}"
        )
    *lead, rows, columns = entry.shape
    if block is None:
        if lead or scales.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise InputError(
                f"{place}/{scales.file}: tensor {scales.name} has shape {list(scales.shape)}, but without "
                f"quantization_config.weight_block_size {name} has one scale, or one for each of its {rows} rows; restore "
                f"the config"
            )
        block = (rows if scales.num_elements == 1 else 1, columns)
    else:
        due = (*lead, _num_blocks(rows, block[0]), _num_blocks(columns, block[1]))
        if scales.shape != due:
            raise InputError(
                f"{place}/{scales.file}: tensor {scales.name} has shape {list(scales.shape)}; blocks of {block[0]} x "
                f"{block[1]} of {list(entry.shape)} need {list(due)}; {_LOST}"
            )
    inputs = [raw[module + one] for one in _FP8_INPUTS if name.endswith(".weight") and module + one in raw]
    parts = {SCALES: scales} | ({INPUT_SCALE: inputs[0]} if inputs else {})
    exact = scheme.has_whole_exponents or scales.dtype == "F8_E8M0"
    return _values(name, entry, entry.shape, replace(scheme, block=block, has_whole_exponents=exact), parts)


def mxfp4(raw: Raw, name: str, entry: TensorEntry, place: str) -> TensorEntry:
    """Values [E, 32 B, R] of pairs of four-bit numbers U8 [E, R, B, 16] with an exponent for each block."""
    values = name.removesuffix(MXFP4_BLOCKS)
    scales = raw.get(values + MXFP4_SCALES)
    well_formed = entry.dtype == "U8" and len(entry.shape) == 4 and 2 * entry.shape[-1] == _MXFP4_BLOCK
    if scales is None or not well_formed or scales.dtype != "U8" or scales.shape != entry.shape[:-1]:
        raise InputError(
            f"{place}/{entry.file}: tensor {name} ({entry.dtype} {list(entry.shape)}) must be U8 [experts, rows, blocks, "
            f"{_MXFP4_BLOCK // 2}] with {values}{MXFP4_SCALES} of its first three sizes; {_LOST}"
        )
    num_experts, rows, num_blocks, _ = entry.shape
    shape = (num_experts, num_blocks * _MXFP4_BLOCK, rows)  # the model stores this tensor transposed
    scheme = Scheme("mxfp4", (1, _MXFP4_BLOCK), 4, has_whole_exponents=True)
    return _values(values, entry, shape, scheme, {SCALES: scales})


def nvfp4(raw: Raw, entry: TensorEntry, module: str, names: Mapping[str, str], place: str) -> TensorEntry:
    """Values of pairs of four-bit numbers U8 [R, C / 2]. names: of the parts in the module."""
    if entry.dtype != "U8" or len(entry.shape) != 2 or 2 * entry.shape[1] % _NVFP4_BLOCK:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}; pairs of four-bit numbers are "
            f"U8 [rows, columns / 2], with {_NVFP4_BLOCK} columns to a scale; {_UNREAD}"
        )
    rows, columns = entry.shape[0], 2 * entry.shape[1]
    sizes = {SCALES: (rows, columns // _NVFP4_BLOCK)}
    parts = {
        part: _needed(raw, entry, module + name, sizes.get(part, (1,)), ["F8_E4M3" if part == SCALES else "F32"], place)
        for part, name in names.items()
        if part not in (INPUT_SCALE, INPUT_DIVISOR) or module + name in raw
    }
    return _values(f"{module}weight", entry, (rows, columns), Scheme("nvfp4", (1, _NVFP4_BLOCK), 4), parts)


def mxfp4_rows(raw: Raw, entry: TensorEntry, module: str, place: str) -> TensorEntry:
    """Values of pairs of four-bit numbers U8 [R, C / 2] with an exponent for each 32 columns."""
    if entry.dtype != "U8" or len(entry.shape) != 2 or 2 * entry.shape[1] % _MXFP4_BLOCK:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}; pairs of four-bit numbers are "
            f"U8 [rows, columns / 2], with {_MXFP4_BLOCK} columns to a scale; {_UNREAD}"
        )
    rows, columns = entry.shape[0], 2 * entry.shape[1]
    scales = _needed(raw, entry, f"{module}weight_scale", (rows, columns // _MXFP4_BLOCK), ["U8"], place)
    scheme = Scheme("mxfp4_rows", (1, _MXFP4_BLOCK), 4, has_whole_exponents=True)
    return _values(f"{module}weight", entry, (rows, columns), scheme, {SCALES: scales})


def int_words(raw: Raw, entry: TensorEntry, module: str, weights: Mapping[str, Any], place: str) -> TensorEntry:
    """Values of whole numbers that are packed densely into I32 [R, words]."""
    bits = count(weights, "num_bits", place)
    if bits > 8 or weights.get("type", "int") != "int" or entry.dtype != "I32" or len(entry.shape) != 2:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} is {entry.dtype} {list(entry.shape)} of {bits} bits and type "
            f"{shown(repr(weights.get('type')))}; at most 8 bits of type int in I32 [rows, words] are read; {_UNREAD}"
        )
    rows, words = entry.shape
    scales = raw.get(f"{module}weight_scale")
    if scales is None:
        raise InputError(f"{place}/{entry.file}: tensor {entry.name} is packed but {module}weight_scale is missing; {_LOST}")
    columns, size = words * 32 // bits, words * 32 // bits
    if weights.get("strategy") == "group":
        size = count(weights, "group_size", place)
        columns = size * (scales.shape[-1] if scales.shape else 1)
    if _num_blocks(columns * bits, 32) != words:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} has {words} words a row; {columns:,} columns of {bits} bits need "
            f"{_num_blocks(columns * bits, 32)}; {_LOST}"
        )
    is_symmetric = weights.get("symmetric", True) is True
    num_groups = columns // size
    parts = {SCALES: _needed(raw, entry, f"{module}weight_scale", (rows, num_groups), SCALE_DTYPES, place)}
    if f"{module}weight_shape" in raw:
        parts[SHAPE] = _needed(raw, entry, f"{module}weight_shape", (2,), ["I64", "I32"], place)
    if not is_symmetric:
        due = (_num_blocks(rows * bits, 32), num_groups)
        parts[ZERO_POINTS] = _needed(raw, entry, f"{module}weight_zero_point", due, ["I32"], place)
    return _values(f"{module}weight", entry, (rows, columns), Scheme("int", (1, size), bits, is_symmetric), parts)


def int_bytes(raw: Raw, entry: TensorEntry, module: str, weights: Mapping[str, Any], place: str) -> TensorEntry:
    """Values of whole numbers of a byte each, I8 [R, C], with a scale for each row, or for each group of columns of it."""
    strategy = weights.get("strategy")
    is_int = weights.get("type", "int") == "int" and count(weights, "num_bits", place) <= 8
    if strategy not in ("channel", "group") or not is_int or len(entry.shape) != 2:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} is {entry.dtype} {list(entry.shape)} of type "
            f"{shown(repr(weights.get('type')))} with strategy {shown(repr(strategy))}; of int-quantized, whole numbers of at "
            f"most 8 bits are read, with a scale for each row (channel) or group of columns (group); {_UNREAD}"
        )
    rows, columns = entry.shape
    size = columns if strategy == "channel" else count(weights, "group_size", place)
    if columns % size:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} has {columns:,} columns, which do not divide into groups of {size:,}; "
            f"{_UNREAD}"
        )
    is_symmetric, shape = weights.get("symmetric", True) is True, (rows, columns // size)
    parts = {SCALES: _needed(raw, entry, f"{module}weight_scale", shape, SCALE_DTYPES, place)}
    if not is_symmetric:
        parts[ZERO_POINTS] = _needed(raw, entry, f"{module}weight_zero_point", shape, ["I8"], place)
    if f"{module}input_scale" in raw:
        parts[INPUT_SCALE] = _needed(raw, entry, f"{module}input_scale", (1,), SCALE_DTYPES, place)
    scheme = Scheme("int_bytes", (1, size), weights["num_bits"], is_symmetric)
    return _values(f"{module}weight", entry, entry.shape, scheme, parts)


def fitted(raw: Raw, entry: TensorEntry, module: str, section: Mapping[str, Any], place: str) -> TensorEntry:
    """Values of GPTQ and AWQ, I32: the tensor of values is transposed, and its numbers are packed along rows (GPTQ) or columns
    (AWQ)."""
    is_gptq, bits = section["quant_method"] == "gptq", count(section, "bits", place)
    per_word = 32 // bits
    if entry.dtype != "I32" or len(entry.shape) != 2:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}; it must be I32 with two axes; "
            f"{_LOST}"
        )
    columns, rows = entry.shape[0] * (per_word if is_gptq else 1), entry.shape[1] * (1 if is_gptq else per_word)
    size = columns if section.get("group_size") == -1 else count(section, "group_size", place)
    num_groups = _num_blocks(columns, size)
    parts = {
        SCALES: _needed(raw, entry, f"{module}scales", (num_groups, rows), SCALE_DTYPES, place),
        ZERO_POINTS: _needed(raw, entry, f"{module}qzeros", (num_groups, rows // per_word), ["I32"], place),
    }
    if f"{module}g_idx" in raw:
        parts[GROUPS] = _needed(raw, entry, f"{module}g_idx", (columns,), ["I32", "I64"], place)
    offset = int(is_gptq and section.get("checkpoint_format") != "gptq_v2")
    scheme = Scheme("gptq" if is_gptq else "awq", (1, size), bits, is_symmetric=False, zero_offset=offset)
    return _values(f"{module}weight", entry, (rows, columns), scheme, parts)
