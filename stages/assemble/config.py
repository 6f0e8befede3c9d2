"""Config of a merged checkpoint: the raw JSON of the source's config, with only the necessary keys changed."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from stages.checkpoint.quantised import quantisation_config
from stages.checkpoint.side_files import without_model_code
from stages.model.families import expert_count_fields, mtp_fields, num_experts_in, text_config
from stages.model.tied import tied_config
from stages.model.widths import narrowed


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
    num_neurons: int | None = None,
) -> dict[str, Any]:
    """Config of a merged checkpoint.

    architecture: transformers class of the language model. auto_classes: class that each transformers Auto class gives for the
    source. num_merged: merged experts r of each MoE layer; the same for all layers if stock. value_dtype: torch name of the
    dtype in which formerly quantised values are written. num_neurons: of an expert, where it has fewer than the source's.
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
    if num_neurons is not None or min(num_merged.values()) < num_experts_in(config, "config.json"):
        _without_mtp(edited)
    if quantisation_config(config) is not None:
        _without_quantisation(edited, value_dtype)
    return edited


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
