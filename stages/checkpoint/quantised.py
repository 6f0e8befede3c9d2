"""Pairs the tensors of a quantised checkpoint, from headers alone. `reader.py` computes their values.

A quantised tensor and its scales become one entry that represents the values. Unpaired tensors are an error, so that packed
bytes are never taken for numbers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stages.checkpoint.headers import Packing, TensorEntry
from stages.contracts.errors import InputError

VALUE_DTYPE = "BF16"
"""Dtype in which the values of a packed tensor are listed. The setting `export.dtype` decides the dtype written."""
VALUE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Allowed settings of `export.dtype`, with their safetensors names."""
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
SCHEMES = ("fp8", "mxfp4")
_FP8_SCALES = "_scale_inv"
_SCALE_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E8M0")
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_MXFP4_BLOCK = 32


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation section of a raw config, at its top or in its language model section."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    return found if isinstance(found, dict) else None


def quantisation_scheme(config: Mapping[str, Any], place: str) -> str | None:
    """A key of SCHEMES, or None for an unquantised checkpoint. Raises InputError for any other scheme."""
    section = quantisation_config(config)
    if section is None:
        return None
    method = section.get("quant_method")
    if method not in SCHEMES:
        raise InputError(
            f"{place}: config.json: quantization_config.quant_method is {method!r}; its experts cannot be averaged. Known: "
            f"{', '.join(SCHEMES)}; use the checkpoint from before quantisation"
        )
    if section.get("activation_scheme", "dynamic") != "dynamic":
        raise InputError(
            f"{place}: config.json: quantization_config.activation_scheme is {section['activation_scheme']!r}; only 'dynamic' "
            f"is read; use the checkpoint from before quantisation"
        )
    return str(method)


def unpacked_entries(raw: Mapping[str, TensorEntry], config: Mapping[str, Any], place: str) -> dict[str, TensorEntry]:
    """Entries by name in the order of `raw`. Every quantised tensor is joined with its scales.

    Raises InputError, naming file and tensor, for packed bytes without scales or scales without packed bytes.
    """
    scheme = quantisation_scheme(config, place)
    if scheme == "fp8":
        return _join_fp8(raw, quantisation_config(config) or {}, place)
    if scheme == "mxfp4":
        return _join_mxfp4(raw, place)
    for name, entry in raw.items():
        if entry.dtype in FP8_DTYPES or name.endswith((_MXFP4_BLOCKS, _FP8_SCALES)):
            raise InputError(
                f"{place}/{entry.file}: tensor {name} ({entry.dtype}) is quantised but config.json has no quantization_config; "
                f"restore it, or use the checkpoint from before quantisation"
            )
    return dict(raw)


def _num_blocks(size: int, block: int) -> int:
    return -(-size // block)


def _join_fp8(raw: Mapping[str, TensorEntry], section: Mapping[str, Any], place: str) -> dict[str, TensorEntry]:
    block = section.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise InputError(
            f"{place}: config.json: quantization_config.weight_block_size is {block!r}; two positive integers are due"
        )
    rows, columns = block
    entries: dict[str, TensorEntry] = {}
    for name, entry in raw.items():
        if name.endswith(_FP8_SCALES):
            weight = raw.get(name.removesuffix(_FP8_SCALES))
            if weight is None or weight.dtype not in FP8_DTYPES:
                raise InputError(
                    f"{place}/{entry.file}: tensor {name} holds scales but {name.removesuffix(_FP8_SCALES)} is not FP8"
                )
            continue
        if entry.dtype not in FP8_DTYPES:
            entries[name] = entry
            continue
        scales = raw.get(name + _FP8_SCALES)
        if scales is None or len(entry.shape) < 2:
            raise InputError(f"{place}/{entry.file}: tensor {name} is {entry.dtype} but {name}{_FP8_SCALES} is missing")
        if scales.dtype not in _SCALE_DTYPES:
            raise InputError(
                f"{place}/{scales.file}: tensor {scales.name} is {scales.dtype}; scales are one of {', '.join(_SCALE_DTYPES)}"
            )
        due = (*entry.shape[:-2], _num_blocks(entry.shape[-2], rows), _num_blocks(entry.shape[-1], columns))
        if scales.shape != due:
            raise InputError(
                f"{place}/{scales.file}: tensor {scales.name} has shape {list(scales.shape)}; blocks of {rows} x {columns} of "
                f"{list(entry.shape)} need {list(due)}"
            )
        entries[name] = _values(name, entry, entry.shape, Packing("fp8", entry, scales, (rows, columns)))
    return entries


def _join_mxfp4(raw: Mapping[str, TensorEntry], place: str) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name, entry in raw.items():
        if name.endswith(_MXFP4_SCALES) and entry.dtype == "U8":
            if name.removesuffix(_MXFP4_SCALES) + _MXFP4_BLOCKS not in raw:
                raise InputError(f"{place}/{entry.file}: tensor {name} holds scales but its {_MXFP4_BLOCKS} are missing")
            continue
        if not name.endswith(_MXFP4_BLOCKS):
            entries[name] = entry
            continue
        values = name.removesuffix(_MXFP4_BLOCKS)
        scales = raw.get(values + _MXFP4_SCALES)
        well_formed = entry.dtype == "U8" and len(entry.shape) == 4 and 2 * entry.shape[-1] == _MXFP4_BLOCK
        if scales is None or not well_formed or scales.dtype != "U8" or scales.shape != entry.shape[:-1]:
            raise InputError(
                f"{place}/{entry.file}: tensor {name} ({entry.dtype} {list(entry.shape)}) must be U8 [experts, rows, blocks, "
                f"{_MXFP4_BLOCK // 2}] with {values}{_MXFP4_SCALES} of its first three sizes; download the checkpoint again"
            )
        num_experts, rows, num_blocks, _ = entry.shape
        shape = (num_experts, num_blocks * _MXFP4_BLOCK, rows)  # the model stores this tensor transposed
        entries[values] = _values(values, entry, shape, Packing("mxfp4", entry, scales, (1, _MXFP4_BLOCK)))
    return entries


def _values(name: str, weight: TensorEntry, shape: tuple[int, ...], packing: Packing) -> TensorEntry:
    entry = replace(weight, name=name, dtype=VALUE_DTYPE, shape=shape, packing=packing)
    return replace(entry, num_bytes=2 * entry.num_elements)
