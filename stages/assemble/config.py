"""The target's config: the source's raw JSON, edited in the keys that change and in no other."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from stages.common.families import expert_count_fields, text_config
from stages.common.tied import tied_config


def stock_config(config: Mapping[str, Any], num_merged: int) -> dict[str, Any]:
    """The config of the same architecture with fewer experts."""
    edited = deepcopy(dict(config))
    text = text_config(edited)
    assert isinstance(text, dict)
    for name in expert_count_fields(edited):
        text[name] = num_merged
    return edited


def target_config(config: Mapping[str, Any], num_merged: Mapping[int, int], export_format: str) -> dict[str, Any]:
    """The target's config. num_merged: merged experts r of each MoE layer; one number for all layers if stock."""
    if export_format == "tied":
        return tied_config(config, num_merged)
    (count,) = set(num_merged.values())
    return stock_config(config, count)
