"""Pairs the tensors of a quantised checkpoint, from headers alone, as its `quantization_config` says.

A quantised tensor and its scales become one entry that represents the values (`packed_entries.py`); `codec.py` computes these.
Unpaired tensors are an error, so that packed bytes are never taken for numbers. `docs/quantised.md` lists the schemes and their
published descriptions.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stages.checkpoint.headers import TensorEntry
from stages.checkpoint.packed_entries import (
    MXFP4_BLOCKS,
    MXFP4_SCALES,
    Raw,
    count,
    fitted,
    fp8,
    int_bytes,
    int_words,
    is_count,
    mxfp4,
    mxfp4_rows,
    nvfp4,
)
from stages.checkpoint.schemes import GLOBAL_DIVISOR, GLOBAL_SCALE, INPUT_DIVISOR, INPUT_SCALE, SCALES, Scheme
from stages.contracts.errors import InputError
from stages.io.untrusted import shown

SOURCE_DTYPE = "source"
"""Value of `export.dtype` that keeps the scheme of the source."""
VALUE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Plain dtypes that `export.dtype` allows, with their safetensors names."""
FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_LOST = "download the checkpoint again"

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
            if entry.dtype in FP8_DTYPES or name.endswith((MXFP4_BLOCKS, "_scale_inv", ".weight_packed", ".qweight")):
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
                f"{place}/{entry.file}: tensor {name} is {entry.dtype}, which quant_method {method!r} has no scales for; "
                f"use the checkpoint from before quantisation"
            )
        else:
            entries[name] = entry
    return entries


def _join_fp8(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    block = section.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(map(is_count, block))):
        raise InputError(
            f"{place}: config.json: quantization_config.weight_block_size is {block!r}; two positive integers are due: "
            f"restore the config"
        )
    pair = (block[0], block[1]) if block is not None else None
    scheme = Scheme("fp8", (1, 1), 8, has_whole_exponents=section.get("scale_fmt") == "ue8m0")

    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        return fp8(raw, name, entry, pair, scheme, place) if entry.dtype in FP8_DTYPES else None

    return join


def _join_mxfp4(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        return mxfp4(raw, name, entry, place) if name.endswith(MXFP4_BLOCKS) else None

    return join


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
            raise InputError(
                f"{place}: config.json: quantization_config.config_groups.{shown(name)} needs targets and "
                f"weights: restore the config"
            )
        for one in targets:
            try:
                re.compile(one.removeprefix("re:"))
            except re.error as e:
                raise InputError(
                    f"{place}: config.json: quantization_config names the pattern {shown(one)}: {e}: correct it"
                ) from e
        groups.append(_Group(tuple(targets), weights, str(group.get("format") or section.get("format"))))
    if not groups:
        raise InputError(f"{place}: config.json: quantization_config.config_groups is missing; restore it")
    return groups


_COMPRESSED = {SCALES: "weight_scale", GLOBAL_DIVISOR: "weight_global_scale", INPUT_DIVISOR: "input_global_scale"}


def _join_compressed(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    groups = _groups(section, place)

    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        module, _, own = name.rpartition(".")
        if own not in ("weight", "weight_packed") or (own == "weight" and entry.dtype not in (*FP8_DTYPES, "I8")):
            return None
        if f"{module}.weight_g_idx" in raw:
            raise InputError(
                f"{place}/{entry.file}: {module}.weight_g_idx orders columns by activation, which is not read; "
                f"use the checkpoint from before quantisation"
            )
        named = [group for group in groups if group.holds(module)]
        group = (named or [one for one in groups if any(target.isidentifier() for target in one.targets)] or groups)[0]
        if entry.dtype == "I8" and group.format == "int-quantized":
            return int_bytes(raw, entry, f"{module}.", group.weights, place)
        if entry.dtype != "I8" and own == "weight" and group.format in ("float-quantized", "naive-quantized"):
            block = group.weights.get("block_structure")
            is_block = group.weights.get("strategy") == "block"
            if is_block and not (isinstance(block, list) and len(block) == 2 and all(map(is_count, block))):
                raise InputError(
                    f"{place}: config.json: quantization_config: block_structure is {shown(repr(block))}: use "
                    f"the checkpoint from before quantisation"
                )
            return fp8(raw, name, entry, (block[0], block[1]) if is_block and block else None, Scheme("fp8", (1, 1), 8), place)
        if own == "weight_packed" and group.format == "nvfp4-pack-quantized":
            return nvfp4(raw, entry, f"{module}.", _COMPRESSED, place)
        if own == "weight_packed" and group.format == "mxfp4-pack-quantized":
            return mxfp4_rows(raw, entry, f"{module}.", place)
        if own == "weight_packed" and group.format == "pack-quantized":
            return int_words(raw, entry, f"{module}.", group.weights, place)
        raise InputError(
            f"{place}/{entry.file}: tensor {name} has the format {shown(group.format)}; known: float-quantized, "
            f"naive-quantized (FP8), int-quantized, pack-quantized, mxfp4-pack-quantized, nvfp4-pack-quantized: use the "
            f"checkpoint from before quantisation"
        )

    return join


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
            return nvfp4(raw, entry, name.removesuffix("weight"), _MODELOPT, place)
        return fp8(raw, name, entry, None, Scheme("fp8", (1, 1), 8), place) if entry.dtype in FP8_DTYPES else None

    return join


def _join_fitted(raw: Raw, section: Mapping[str, Any], place: str) -> Join:
    """GPTQ and AWQ."""
    is_gptq = section["quant_method"] == "gptq"
    bits = count(section, "bits", place)
    if bits not in ((2, 4, 8) if is_gptq else (4,)) or str(section.get("version") or "gemm").lower() != "gemm":
        raise InputError(
            f"{place}: config.json: quantization_config has {bits} bits and version {section.get('version')!r}; GPTQ of 2, 4 "
            f"and 8 bits and AWQ of 4 bits, version gemm, are read: use the checkpoint from before quantisation"
        )

    def join(name: str, entry: TensorEntry) -> TensorEntry | None:
        return fitted(raw, entry, name.removesuffix("qweight"), section, place) if name.endswith(".qweight") else None

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
    "mxfp4": (MXFP4_SCALES,),
    "compressed-tensors": (".weight_scale", ".weight_global_scale", ".weight_shape", ".weight_zero_point"),
    "modelopt": (".weight_scale", ".weight_scale_2"),
    "gptq": (".qzeros", ".scales"),
    "awq": (".qzeros", ".scales"),
}
"""Ends of names that only parts of packed tensors have, by method."""
