"""Config of a merged checkpoint: the raw JSON of the source's config, with only the necessary keys changed."""

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from stages.checkpoint.quantised import SOURCE_DTYPE, quantisation_config
from stages.checkpoint.side_files import without_model_code
from stages.model.families import expert_count_fields, mtp_fields, num_experts_in, text_config
from stages.model.tied import tied_config
from stages.model.widths import narrowed

_IGNORE_LISTS = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
"""Names by which the schemes list modules that are not packed."""


def stock_config(config: Mapping[str, Any], num_merged: int) -> dict[str, Any]:
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
) -> dict[str, Any]:
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
    if not is_whole and not (merges_mtp and export_format == "stock" and num_neurons is None):
        _without_mtp(edited)
    if quantisation_config(config) is not None:
        if value_dtype == SOURCE_DTYPE:
            _keep_quantisation(edited, export_format, source_names, written_names)
        else:
            _without_quantisation(edited, value_dtype)
    return edited


def _keep_quantisation(
    config: dict[str, Any], export_format: str, source_names: Collection[str], written_names: Collection[str]
) -> None:
    """Make the section true of what is written. Entries that named only modules which are no longer there leave its lists; all
    others stay, patterns too.

    A tied export asks transformers for values instead of packed experts: its own modules of packed experts have as many experts
    as the config says.
    """
    text = text_config(config)
    sections = [section for section in (config, text) if isinstance(section.get("quantization_config"), dict)]
    lost = _modules(source_names) - _modules(written_names)
    for section in sections:
        quantisation = section["quantization_config"]
        for name in _IGNORE_LISTS:
            if isinstance(quantisation.get(name), list):
                quantisation[name] = [one for one in quantisation[name] if one not in lost]
        if export_format == "tied":
            quantisation["dequantize"] = True


def _modules(names: Collection[str]) -> set[str]:
    """Names of all modules around some tensors."""
    found: set[str] = set()
    for name in names:
        while (name := name.rpartition(".")[0]) and name not in found:
            found.add(name)
    return found


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
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


def _without_mtp(config: dict[str, Any]) -> None:
    text = text_config(config)
    assert isinstance(text, dict)
    for name in mtp_fields(config):
        text[name] = 0


def _without_quantisation(config: dict[str, Any], value_dtype: str) -> None:
    text = text_config(config)
    assert isinstance(text, dict)
    for section in (config, text):
        section.pop("quantization_config", None)
        for name in ("dtype", "torch_dtype"):
            if name in section:
                section[name] = value_dtype
