"""Checks of a `config.json` before a model is built: it can be written again, its numbers are bounded, and it is
self-contained.

This module does not need torch, so that a bad config is refused before a process is started.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from stages.checkpoint.folder import CONFIG_FILE, Checkpoint
from stages.contracts.errors import InputError
from stages.io.untrusted import shown
from stages.model.families import (
    EXPERT_COUNT_FIELDS,
    TOP_K_FIELDS,
    expert_count_fields,
    groups_in,
    num_experts_in,
    number_in,
    text_config,
    top_k_in,
)

MAX_COUNT = 1 << 20
"""Bound for layers, heads, labels, sizes and similar counts: transformers makes lists that long before reading a tensor."""
_MAX_DEPTH = 100
_COUNTS = re.compile(r"^(num|n)_|_(layers?|heads|experts|groups|labels|sizes?|dims?|rank|replace|interval|step|period)$|top_?k")
_NO_COUNTS = re.compile(r"window|chunk|position|length|token|block_size|vocab")
# transformers' classes take one number. A list with one entry per layer is accepted if all its entries are equal.
_ALIKE = (
    *EXPERT_COUNT_FIELDS, *TOP_K_FIELDS, "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
    "num_shared_expert", "num_shared_experts", "n_shared_experts", "moe_num_shared_experts",
)  # fmt: skip
# Settings that make transformers read other files than this config and the weight files.
_ELSEWHERE = {
    "configuration_files": "it names other config files for other versions of transformers",
}


def _check_layers(configs: Any, place: str) -> None:
    """Layers may differ in attention, as in dots3_note.
    A number or size of experts that differs between layers is not supported."""
    if not configs:
        return
    if not isinstance(configs, dict) or not all(isinstance(settings, dict) for settings in configs.values()):
        raise InputError(f"{place}: per_layer_config must map layers to settings; restore the config")
    for layer, settings in configs.items():
        name = next((name for name in _ALIKE if name in settings), None)
        if name is not None:
            raise InputError(
                f"{place}: per_layer_config is not supported where it sets {name}, as for layer {shown(str(layer))}: experts "
                f"must be alike in all layers; remove it"
            )


def check_config(checkpoint: Checkpoint) -> None:
    """Raise InputError for a config that cannot be written again, refers to other files, or has counts that contradict the
    files.

    Also raises it for a family that is not supported.
    """
    config, place = checkpoint.config, str(checkpoint.folder / CONFIG_FILE)
    for path, value, depth in _values(config):
        _check_writable(path, value, depth, place)
        _check_count(path, value, place)
    text = text_config(config)
    for section in (config, text):
        for name, reason in _ELSEWHERE.items():
            if section.get(name):
                raise InputError(f"{place}: {name} is not supported: {reason}; remove it")
    _check_layers(text.get("per_layer_config"), place)
    for name in _ALIKE:
        if isinstance(text.get(name), list):
            number_in(text, name, place)
    number_in(text, "max_position_embeddings", place)
    num_experts = num_experts_in(config, place)
    top_k_in(config, place)
    groups_in(config, place)
    longest = max((max(entry.shape, default=0) for entry in checkpoint.tensors.values()), default=0)
    held = {**dict.fromkeys(expert_count_fields(config), num_experts)}
    held |= {name: _needed(text, name, place) for name in ("hidden_size", "vocab_size")}
    for name, number in held.items():
        if number > longest:
            raise InputError(
                f"{place}: {name} is {number:,} but no tensor of the checkpoint is longer than {longest:,}; config and weights "
                "do not belong together: download the checkpoint again"
            )
    num_layers = number_in(text, "num_hidden_layers", place)
    if num_layers is not None and num_layers > len(checkpoint.tensors):
        raise InputError(
            f"{place}: num_hidden_layers is {num_layers:,} but the checkpoint has {len(checkpoint.tensors):,} tensors; config "
            f"and weights do not belong together: download the checkpoint again"
        )


def without_lists(config: Mapping[str, Any]) -> dict[str, Any]:
    """A checked config in which each list of equal numbers, one per layer, is replaced by the number."""
    text = text_config(config)
    plain = {**text, **{name: text[name][0] for name in _ALIKE if isinstance(text.get(name), list)}}
    return plain if text is config else {**config, "text_config": plain}


def _values(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Every value in a config with its path of keys and its depth. Not recursive, because the depth is not bounded yet."""
    left: list[tuple[str, Any, int]] = [("", config, 0)]
    while left:
        path, value, depth = left.pop()
        yield path, value, depth
        if depth > _MAX_DEPTH:
            continue
        if isinstance(value, dict):
            left += ((f"{path}.{key}" if path else key, entry, depth + 1) for key, entry in value.items())
        elif isinstance(value, list):
            left += ((path, entry, depth + 1) for entry in value)


def _check_writable(path: str, value: Any, depth: int, place: str) -> None:
    if depth > _MAX_DEPTH:
        raise InputError(f"{place}: {shown(repr(path))} lies more than {_MAX_DEPTH} levels deep; restore the config")
    for text in (path, value):
        if isinstance(text, str):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as e:
                raise InputError(f"{place}: {shown(repr(path))} holds half a character (a lone surrogate); remove it") from e


def _check_count(path: str, value: Any, place: str) -> None:
    name = path.rpartition(".")[2]
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and value > MAX_COUNT and _COUNTS.search(name) and not _NO_COUNTS.search(name):
        raise InputError(f"{place}: {path} is {shown(repr(value))}; at most {MAX_COUNT:,} is accepted: restore the config")


def _needed(text: Mapping[str, Any], name: str, place: str) -> int:
    number = number_in(text, name, place)
    if number is None:
        raise InputError(f"{place} has no {name}; restore the config")
    return number
