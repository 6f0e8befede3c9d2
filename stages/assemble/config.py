"""Config of a merged checkpoint: the raw JSON of the source's config, with only the necessary keys changed."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from pydantic import JsonValue

from stages.checkpoint.quantised import SOURCE_DTYPE, quantisation_config
from stages.checkpoint.side_files import without_model_code
from stages.model.families import expert_count_fields, mtp_fields, num_experts_in, text_config
from stages.model.tied import tied_config
from stages.model.widths import narrowed

_IGNORE_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
"""Names by which the schemes list modules that are not packed."""

_WITH_ROPE_THETA = frozenset({
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "gpt_oss", "granitemoe", "hunyuan_v1_moe", "minimax",
    "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
})  # fmt: skip
"""Families whose configs had `rope_theta` beside no other rotary setting before transformers 5 put both into
`rope_parameters`. Other engines (mlx-lm) still read the older name alone, and take their own default without it."""


RawConfig = dict[str, JsonValue]
"""A `config.json` that is edited."""


def stock_config(config: Mapping[str, Any], num_merged: int) -> RawConfig:
    """Config of the same architecture with fewer experts."""
    edited = deepcopy(dict(config))
    text = text_config(edited)
    assert isinstance(text, dict)
    for name in expert_count_fields(edited):
        text[name] = [num_merged] * len(text[name]) if isinstance(text[name], list) else num_merged
    return edited


def target_config(
    config: Mapping[str, Any],
    architecture: str,
    auto_classes: Mapping[str, str],
    num_merged: Mapping[int, int],
    export_format: str,
    value_dtype: str,
    source_names: Collection[str] = (),
    written_names: Collection[str] = (),
    merges_mtp: bool = False,
    num_neurons: int | None = None,
) -> RawConfig:
    """Config of a merged checkpoint.

    architecture: transformers class of the language model. auto_classes: class that each transformers Auto class gives for the
    source. num_merged: merged experts r of each MoE layer; the same for all layers if stock. value_dtype: of `export.dtype`.
    source_names, written_names: of the stored tensors of the source and of the export. merges_mtp: whether a stock export has
    the layers that predict further tokens. num_neurons: of an expert, where it has fewer than the source's.
    """
    source = _without_origin(config)
    if export_format == "tied":
        edited = tied_config(source, architecture, auto_classes, num_merged)
    else:
        (count,) = set(num_merged.values())
        edited = stock_config(source, count)
    if num_neurons is not None:
        text = text_config(edited)
        assert isinstance(text, dict)
        text.update(narrowed(config, num_neurons, "config.json"))
    is_whole = num_neurons is None and min(num_merged.values()) == num_experts_in(config, "config.json")
    if not is_whole:
        _add_rope_theta(edited)
    if not is_whole and not (merges_mtp and num_neurons is None):
        _without_mtp(edited)
    if quantisation_config(config) is not None:
        if value_dtype == SOURCE_DTYPE:
            _keep_quantisation(edited, export_format, source_names, written_names)
        else:
            _without_quantisation(edited, value_dtype)
    return edited


def _add_rope_theta(config: RawConfig) -> None:
    """Write the base of rotary angles under its older name too, where that says all that `rope_parameters` says."""
    text = text_config(config)
    assert isinstance(text, dict)
    rope = text.get("rope_parameters")
    if (
        text.get("model_type") in _WITH_ROPE_THETA
        and isinstance(rope, dict)
        and set(rope) == {"rope_theta", "rope_type"}
        and rope["rope_type"] == "default"
    ):
        text.setdefault("rope_theta", rope["rope_theta"])


def _keep_quantisation(
    config: RawConfig, export_format: str, source_names: Collection[str], written_names: Collection[str]
) -> None:
    """Make the section true of what is written. Entries that named only modules which are no longer there leave its lists; all
    others stay, patterns too.

    A tied export asks transformers for values instead of packed experts: its own modules of packed experts have as many experts
    as the config says.
    """
    lost = _modules(source_names) - _modules(written_names)
    for section in (config, text_config(config)):
        quantisation = section.get("quantization_config")
        if not isinstance(quantisation, dict):
            continue
        for name in _IGNORE_LISTS:
            listed = quantisation.get(name)
            if isinstance(listed, list):
                quantisation[name] = [one for one in listed if one not in lost]
        if export_format == "tied":
            quantisation["dequantize"] = True


def _modules(names: Collection[str]) -> set[str]:
    """Names of all modules around some tensors."""
    found: set[str] = set()
    for name in names:
        while (name := name.rpartition(".")[0]) and name not in found:
            found.add(name)
    return found


def _without_origin(config: Mapping[str, Any]) -> RawConfig:
    """A copy without the path that the source was loaded from, which is often local, and without the names of model code. The
    code is not exported, and transformers would look for it under trust_remote_code."""
    edited = deepcopy(dict(config))
    text = text_config(edited)
    assert isinstance(text, dict)
    for section in (edited, text):
        section.pop("_name_or_path", None)
        auto_map = without_model_code(section.pop("auto_map", None))
        if auto_map:
            section["auto_map"] = auto_map
    return edited


def _without_mtp(config: RawConfig) -> None:
    text = text_config(config)
    assert isinstance(text, dict)
    for name in mtp_fields(config):
        text[name] = 0


def _without_quantisation(config: RawConfig, value_dtype: str) -> None:
    text = text_config(config)
    assert isinstance(text, dict)
    for section in (config, text):
        section.pop("quantization_config", None)
        for name in ("dtype", "torch_dtype"):
            if name in section:
                section[name] = value_dtype
