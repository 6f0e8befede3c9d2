"""Pairs the tensors of a quantised checkpoint, from headers alone. `codec.py` computes their values.

A quantised tensor and its scales become one entry that represents the values. Unpaired tensors are an error, so that packed
bytes are never taken for numbers. `docs/quantised.md` lists the schemes and their published descriptions.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stages.checkpoint.headers import Packing, TensorEntry
from stages.checkpoint.schemes import (
    GLOBAL_DIVISOR,
    GLOBAL_SCALE,
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

SOURCE_DTYPE = "source"
"""Value of `export.dtype` that keeps the scheme of the source."""
VALUE_DTYPE = "BF16"
"""Dtype in which the values of a packed tensor are listed. The setting `export.dtype` decides the dtype written."""
VALUE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Plain dtypes that `export.dtype` allows, with their safetensors names."""
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_SCALE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
_FP8_SCALES = ("_scale_inv", "_scale")
_FP8_INPUTS = ("input_scale", "activation_scale")
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_MXFP4_BLOCK, _NVFP4_BLOCK = 32, 16
_LOST = "download the checkpoint again"

Raw = Mapping[str, TensorEntry]
Join = Callable[[str, TensorEntry], TensorEntry | None]
"""Given a tensor on disk, the entry of the values that it is the numbers of; None where it is no packed numbers."""


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation section of a raw config, at its top or in its language model section."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    return found if isinstance(found, dict) else None


def unpacked_entries(raw: Raw, config: Mapping[str, Any], place: str) -> dict[str, TensorEntry]:
    """Entries by name in the order of `raw`. Every quantised tensor is joined with its scales.

    Raises InputError, naming file and tensor, for packed bytes without scales or scales without packed bytes, and for a scheme
    that is not known.
    """
    section = quantisation_config(config)
    if section is None:
        for name, entry in raw.items():
            if entry.dtype in FP8_DTYPES or name.endswith((_MXFP4_BLOCKS, "_scale_inv", ".weight_packed", ".qweight")):
                raise InputError(
                    f"{place}/{entry.file}: tensor {name} ({entry.dtype}) is quantised but config.json has no "
                    f"quantization_config; restore it, or use the checkpoint from before quantisation"
                )
        return dict(raw)
    method = section.get("quant_method")
    if method not in _METHODS:
        raise InputError(
            f"{place}: config.json: quantization_config.quant_method is {method!r}; its experts cannot be averaged. Known: "
            f"{', '.join(_METHODS)}; use the checkpoint from before quantisation"
        )
    join, lone = _METHODS[method](raw, section, place), _LONE[method]
    joined = {name: values for name, entry in raw.items() if (values := join(name, entry)) is not None}
    used = {part.name for values in joined.values() if values.packing for part in values.packing.parts.values()}
    entries: dict[str, TensorEntry] = {}
    for name, entry in raw.items():
        if name in joined:
            entries[joined[name].name] = joined[name]
        elif name in used:
            continue
        elif name.endswith(lone):
            raise InputError(f"{place}/{entry.file}: tensor {name} holds scales but the packed numbers are missing; {_LOST}")
        elif entry.dtype in FP8_DTYPES:
            raise InputError(
                f"{place}/{entry.file}: tensor {name} is {entry.dtype}, which quant_method {method!r} has no scales for"
            )
        else:
            entries[name] = entry
    return entries


def _values(name: str, weight: TensorEntry, shape: Sequence[int], scheme: Scheme, parts: Raw) -> TensorEntry:
    packing = Packing(scheme, {WEIGHT: weight, **parts})
    entry = replace(weight, name=name, dtype=VALUE_DTYPE, shape=tuple(shape), packing=packing)
    return replace(entry, num_bytes=2 * entry.num_elements)


def _num_blocks(size: int, block: int) -> int:
    return -(-size // block)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 40


def _count(section: Mapping[str, Any], name: str, place: str) -> int:
    value = section.get(name)
    if not _is_count(value):
        raise InputError(
            f"{place}: config.json: quantization_config: {name} is {shown(repr(value))}; it must be a positive integer"
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
            f"{list(weight.shape)} needs {list(shape)} of {', '.join(dtypes)}"
        )
    return part


def _fp8(raw: Raw, name: str, entry: TensorEntry, block: tuple[int, int] | None, scheme: Scheme, place: str) -> TensorEntry:
    """Values of FP8 numbers [..., R, C]. block: rows and columns of a scale; None for a scale of the tensor or of every row."""
    module = name.removesuffix("weight")
    scales = next((raw[name + suffix] for suffix in _FP8_SCALES if name + suffix in raw), None)
    if scales is None or len(entry.shape) < 2:
        raise InputError(f"{place}/{entry.file}: tensor {name} is {entry.dtype} but {name}{_FP8_SCALES[0]} is missing")
    if scales.dtype not in _SCALE_DTYPES:
        raise InputError(
            f"{place}/{scales.file}: tensor {scales.name} is {scales.dtype}; scales are one of {', '.join(_SCALE_DTYPES)}"
        )
    *lead, rows, columns = entry.shape
    if block is None:
        if lead or scales.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise InputError(
                f"{place}/{scales.file}: tensor {scales.name} has shape {list(scales.shape)}, but without "
                f"quantization_config.weight_block_size {name} has one scale, or one for each of its {rows} rows"
            )
        block = (rows if scales.num_elements == 1 else 1, columns)
    else:
        due = (*lead, _num_blocks(rows, block[0]), _num_blocks(columns, block[1]))
        if scales.shape != due:
            raise InputError(
                f"{place}/{scales.file}: tensor {scales.name} has shape {list(scales.shape)}; blocks of {block[0]} x "
                f"{block[1]} of {list(entry.shape)} need {list(due)}"
            )
    inputs = [raw[module + one] for one in _FP8_INPUTS if name.endswith(".weight") and module + one in raw]
    parts = {SCALES: scales} | ({INPUT_SCALE: inputs[0]} if inputs else {})
    exact = scheme.has_whole_exponents or scales.dtype == "F8_E8M0"
    return _values(name, entry, entry.shape, replace(scheme, block=block, has_whole_exponents=exact), parts)


def _join_fp8(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    block = section.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(map(_is_count, block))):
        raise InputError(
            f"{place}: config.json: quantization_config.weight_block_size is {block!r}; two positive integers are due"
        )
    pair = (block[0], block[1]) if block is not None else None
    scheme = Scheme("fp8", (1, 1), 8, has_whole_exponents=section.get("scale_fmt") == "ue8m0")

    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        return _fp8(raw, name, entry, pair, scheme, place) if entry.dtype in FP8_DTYPES else None

    return join


def _join_mxfp4(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        if not name.endswith(_MXFP4_BLOCKS):
            return None
        values = name.removesuffix(_MXFP4_BLOCKS)
        scales = raw.get(values + _MXFP4_SCALES)
        well_formed = entry.dtype == "U8" and len(entry.shape) == 4 and 2 * entry.shape[-1] == _MXFP4_BLOCK
        if scales is None or not well_formed or scales.dtype != "U8" or scales.shape != entry.shape[:-1]:
            raise InputError(
                f"{place}/{entry.file}: tensor {name} ({entry.dtype} {list(entry.shape)}) must be U8 [experts, rows, blocks, "
                f"{_MXFP4_BLOCK // 2}] with {values}{_MXFP4_SCALES} of its first three sizes; {_LOST}"
            )
        num_experts, rows, num_blocks, _ = entry.shape
        shape = (num_experts, num_blocks * _MXFP4_BLOCK, rows)  # the model stores this tensor transposed
        scheme = Scheme("mxfp4", (1, _MXFP4_BLOCK), 4, has_whole_exponents=True)
        return _values(values, entry, shape, scheme, {SCALES: scales})

    return join


def _nvfp4(raw: Raw, entry: TensorEntry, module: str, names: Mapping[str, str], place: str) -> TensorEntry:
    """Values of pairs of four-bit numbers U8 [R, C / 2]. names: of the parts in the module."""
    if entry.dtype != "U8" or len(entry.shape) != 2 or 2 * entry.shape[1] % _NVFP4_BLOCK:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}; pairs of four-bit numbers are "
            f"U8 [rows, columns / 2], with {_NVFP4_BLOCK} columns to a scale"
        )
    rows, columns = entry.shape[0], 2 * entry.shape[1]
    sizes = {SCALES: (rows, columns // _NVFP4_BLOCK)}
    parts = {
        part: _needed(raw, entry, module + name, sizes.get(part, (1,)), ["F8_E4M3" if part == SCALES else "F32"], place)
        for part, name in names.items()
        if part not in (INPUT_SCALE, INPUT_DIVISOR) or module + name in raw
    }
    return _values(f"{module}weight", entry, (rows, columns), Scheme("nvfp4", (1, _NVFP4_BLOCK), 4), parts)


@dataclass(frozen=True)
class _Group:
    """A group of modules in a config of compressed-tensors. targets: names, patterns after "re:", or classes of modules."""

    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    format: str

    def holds(self, module: str) -> bool:
        """Whether a module is named."""
        return any(
            re.match(one.removeprefix("re:"), module) is not None if one.startswith("re:") else one == module
            for one in self.targets
        )


def _groups(section: Mapping[str, Any], place: str) -> list[_Group]:
    found = section.get("config_groups")
    groups = []
    for name, group in found.items() if isinstance(found, dict) else ():
        targets, weights = (group.get("targets"), group.get("weights")) if isinstance(group, dict) else (None, None)
        if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets) or not isinstance(weights, dict):
            raise InputError(f"{place}: config.json: quantization_config.config_groups.{shown(name)} needs targets and weights")
        for one in targets:
            try:
                re.compile(one.removeprefix("re:"))
            except re.error as e:
                raise InputError(f"{place}: config.json: quantization_config names the pattern {shown(one)}: {e}") from e
        groups.append(_Group(tuple(targets), weights, str(group.get("format") or section.get("format"))))
    if not groups:
        raise InputError(f"{place}: config.json: quantization_config.config_groups is missing; restore it")
    return groups


_COMPRESSED = {SCALES: "weight_scale", GLOBAL_DIVISOR: "weight_global_scale", INPUT_DIVISOR: "input_global_scale"}


def _join_compressed(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    groups = _groups(section, place)

    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        module, _, own = name.rpartition(".")
        if own not in ("weight", "weight_packed") or (own == "weight" and entry.dtype not in FP8_DTYPES):
            return None
        if f"{module}.weight_g_idx" in raw:
            raise InputError(f"{place}/{entry.file}: {module}.weight_g_idx orders columns by activation, which is not read")
        named = [group for group in groups if group.holds(module)]
        group = (named or [one for one in groups if any(target.isidentifier() for target in one.targets)] or groups)[0]
        if own == "weight" and group.format in ("float-quantized", "naive-quantized"):
            block = group.weights.get("block_structure")
            is_block = group.weights.get("strategy") == "block"
            if is_block and not (isinstance(block, list) and len(block) == 2 and all(map(_is_count, block))):
                raise InputError(f"{place}: config.json: quantization_config: block_structure is {shown(repr(block))}")
            return _fp8(raw, name, entry, (block[0], block[1]) if is_block and block else None, Scheme("fp8", (1, 1), 8), place)
        if own == "weight_packed" and group.format == "nvfp4-pack-quantized":
            return _nvfp4(raw, entry, f"{module}.", _COMPRESSED, place)
        if own == "weight_packed" and group.format == "pack-quantized":
            return _int(raw, entry, f"{module}.", group, place)
        raise InputError(
            f"{place}/{entry.file}: tensor {name} has the format {shown(group.format)}; known: float-quantized, "
            f"naive-quantized (FP8), pack-quantized, nvfp4-pack-quantized: use the checkpoint from before quantisation"
        )

    return join


def _int(raw: Raw, entry: TensorEntry, module: str, group: _Group, place: str) -> TensorEntry:
    """Values of whole numbers that are packed densely into I32 [R, words]."""
    bits = _count(group.weights, "num_bits", place)
    if bits > 8 or group.weights.get("type", "int") != "int" or entry.dtype != "I32" or len(entry.shape) != 2:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} is {entry.dtype} {list(entry.shape)} of {bits} bits and type "
            f"{shown(repr(group.weights.get('type')))}; at most 8 bits of type int in I32 [rows, words] are read"
        )
    rows, words = entry.shape
    scales = raw.get(f"{module}weight_scale")
    if scales is None:
        raise InputError(f"{place}/{entry.file}: tensor {entry.name} is packed but {module}weight_scale is missing; {_LOST}")
    columns, size = words * 32 // bits, words * 32 // bits
    if group.weights.get("strategy") == "group":
        size = _count(group.weights, "group_size", place)
        columns = size * (scales.shape[-1] if scales.shape else 1)
    if _num_blocks(columns * bits, 32) != words:
        raise InputError(
            f"{place}/{entry.file}: tensor {entry.name} has {words} words a row; {columns:,} columns of {bits} bits need "
            f"{_num_blocks(columns * bits, 32)}"
        )
    is_symmetric = group.weights.get("symmetric", True) is True
    num_groups = columns // size
    parts = {SCALES: _needed(raw, entry, f"{module}weight_scale", (rows, num_groups), _SCALE_DTYPES, place)}
    if f"{module}weight_shape" in raw:
        parts[SHAPE] = _needed(raw, entry, f"{module}weight_shape", (2,), ["I64", "I32"], place)
    if not is_symmetric:
        due = (_num_blocks(rows * bits, 32), num_groups)
        parts[ZERO_POINTS] = _needed(raw, entry, f"{module}weight_zero_point", due, ["I32"], place)
    return _values(f"{module}weight", entry, (rows, columns), Scheme("int", (1, size), bits, is_symmetric), parts)


_MODELOPT = {SCALES: "weight_scale", GLOBAL_SCALE: "weight_scale_2", INPUT_SCALE: "input_scale"}


def _join_modelopt(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    algorithm = section.get("quant_algo")
    if algorithm not in ("NVFP4", "FP8"):
        raise InputError(
            f"{place}: config.json: quantization_config.quant_algo is {shown(repr(algorithm))}; known: NVFP4, FP8: use the "
            f"checkpoint from before quantisation"
        )

    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        if not name.endswith(".weight"):
            return None
        if entry.dtype == "U8" and algorithm == "NVFP4":
            return _nvfp4(raw, entry, name.removesuffix("weight"), _MODELOPT, place)
        return _fp8(raw, name, entry, None, Scheme("fp8", (1, 1), 8), place) if entry.dtype in FP8_DTYPES else None

    return join


def _join_fitted(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    """GPTQ and AWQ: the tensor of values is transposed, and its numbers are packed along rows (GPTQ) or columns (AWQ)."""
    is_gptq = section["quant_method"] == "gptq"
    bits = _count(section, "bits", place)
    if bits not in ((2, 4, 8) if is_gptq else (4,)) or str(section.get("version") or "gemm").lower() != "gemm":
        raise InputError(
            f"{place}: config.json: quantization_config has {bits} bits and version {section.get('version')!r}; GPTQ of 2, 4 "
            f"and 8 bits and AWQ of 4 bits, version gemm, are read"
        )
    per_word = 32 // bits
    offset = int(is_gptq and section.get("checkpoint_format") != "gptq_v2")

    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        if not name.endswith(".qweight"):
            return None
        module = name.removesuffix("qweight")
        if entry.dtype != "I32" or len(entry.shape) != 2:
            raise InputError(
                f"{place}/{entry.file}: tensor {name} is {entry.dtype} {list(entry.shape)}; it must be I32 with two axes"
            )
        columns, rows = entry.shape[0] * (per_word if is_gptq else 1), entry.shape[1] * (1 if is_gptq else per_word)
        size = columns if section.get("group_size") == -1 else _count(section, "group_size", place)
        num_groups = _num_blocks(columns, size)
        parts = {
            SCALES: _needed(raw, entry, f"{module}scales", (num_groups, rows), _SCALE_DTYPES, place),
            ZERO_POINTS: _needed(raw, entry, f"{module}qzeros", (num_groups, rows // per_word), ["I32"], place),
        }
        if f"{module}g_idx" in raw:
            parts[GROUPS] = _needed(raw, entry, f"{module}g_idx", (columns,), ["I32", "I64"], place)
        scheme = Scheme("gptq" if is_gptq else "awq", (1, size), bits, is_symmetric=False, zero_offset=offset)
        return _values(f"{module}weight", entry, (rows, columns), scheme, parts)

    return join


_METHODS: dict[str, Callable[[Raw, Mapping[str, Any], str], Join]] = {
    "fp8": _join_fp8,
    "mxfp4": _join_mxfp4,
    "compressed-tensors": _join_compressed,
    "modelopt": _join_modelopt,
    "gptq": _join_fitted,
    "awq": _join_fitted,
}
_LONE: dict[str, tuple[str, ...]] = {
    "fp8": ("_scale_inv", ".weight_scale"),
    "mxfp4": (_MXFP4_SCALES,),
    "compressed-tensors": (".weight_scale", ".weight_global_scale", ".weight_shape", ".weight_zero_point"),
    "modelopt": (".weight_scale", ".weight_scale_2"),
    "gptq": (".qzeros", ".scales"),
    "awq": (".qzeros", ".scales"),
}
"""Ends of names that only parts of packed tensors have, by method."""
