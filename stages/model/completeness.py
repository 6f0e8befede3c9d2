"""Checks from headers alone that a checkpoint fills its model: no tensor is missing or has a wrong shape or type."""

import math
from collections import Counter, defaultdict
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from stages.checkpoint.headers import TensorEntry
from stages.checkpoint.reader import TORCH_DTYPES
from stages.contracts.errors import InputError
from stages.model.adapter import AdaptedModel

_REMEDY = "config and weights do not belong together, or a file is missing: download the checkpoint again"


def check_complete(adapted: AdaptedModel) -> None:
    """Raise InputError, naming file and tensor, if the checkpoint does not fill its model."""
    _check_kinds(adapted)
    _check_alike(adapted)
    _check_counts(adapted)
    _check_conversion(adapted)


def _check_kinds(adapted: AdaptedModel) -> None:
    """Check shapes of tensors loaded without conversion, and that floating-point parameters get floating-point tensors."""
    state = adapted.model.state_dict()
    for name, destination in adapted.destinations.items():
        if not destination.parameter:
            continue
        entry, parameter = adapted.checkpoint.tensors[name], state[destination.parameter]
        place = f"{adapted.checkpoint.folder / entry.file}: tensor {name}"
        if destination.pattern is None and entry.shape != tuple(parameter.shape):
            raise InputError(
                f"{place} has shape {list(entry.shape)} where the config asks for {list(parameter.shape)}; {_REMEDY}"
            )
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None or dtype.is_floating_point != parameter.dtype.is_floating_point:
            raise InputError(f"{place} is {entry.dtype} where the model has {parameter.dtype}; download the checkpoint again")


def _check_alike(adapted: AdaptedModel) -> None:
    """Check that tensors joined to one parameter in the same way, such as those of its experts, have equal shapes."""
    groups: dict[tuple[str, str], list[TensorEntry]] = defaultdict(list)
    for name, destination in adapted.destinations.items():
        if destination.parameter and destination.pattern is not None and "*" in destination.pattern:
            groups[destination.parameter, destination.pattern].append(adapted.checkpoint.tensors[name])
    for entries in groups.values():
        usual = Counter(entry.shape for entry in entries).most_common(1)[0][0]
        odd = next((entry for entry in entries if entry.shape != usual), None)
        if odd is not None:
            raise InputError(
                f"{adapted.checkpoint.folder / odd.file}: tensor {odd.name} has shape {list(odd.shape)} where its likes have "
                f"{list(usual)}; download the checkpoint again"
            )


def _check_counts(adapted: AdaptedModel) -> None:
    """Check numbers of values. A per-expert tensor counts as its share of the parameter that it joins."""
    state = adapted.model.state_dict()
    groups = _made_together(adapted)
    found: dict[str, int] = defaultdict(int)
    for name, destination in adapted.destinations.items():
        found[destination.parameter] += adapted.checkpoint.tensors[name].num_elements
    tied = adapted.model.all_tied_weights_keys
    filled = {name for pair in tied.items() if any(found[one] for one in pair) for name in pair}
    for parameter, tensor in state.items():
        if parameter in filled and not found[parameter]:
            continue
        group = groups.get(parameter, (parameter,))
        due, have = sum(math.prod(state[name].shape) for name in group), found[group[0]]
        if have == due:
            continue
        names = [name for name, destination in adapted.destinations.items() if destination.parameter == group[0]]
        where = f"tensor {names[0]} (and {len(names) - 1} more)" if names else "no tensor"
        file = f"/{adapted.checkpoint.tensors[names[0]].file}" if names else ""
        raise InputError(
            f"{adapted.checkpoint.folder}{file}: {where} fills {parameter} with {have:,} values where the config asks for "
            f"{list(tensor.shape)} = {due:,}; {_REMEDY}"
        )


def _made_together(adapted: AdaptedModel) -> dict[str, tuple[str, ...]]:
    """Parameters that one converter makes from the same tensors, such as a tensor split into several.
    Maps each to its group."""
    state = adapted.model.state_dict()
    groups: dict[str, tuple[str, ...]] = {}
    for converter in adapted.weight_mapping:
        if isinstance(converter, WeightConverter) and len(converter.target_patterns) > 1:
            first, *others = converter.target_patterns
            for parameter in state:
                if first in parameter:
                    group = (parameter, *(parameter.replace(first, other) for other in others))
                    if all(name in state for name in group):
                        groups |= dict.fromkeys(group, group)
    return groups


def _unlike(adapted: AdaptedModel) -> list[str]:
    """Tensors to convert in the check. A parameter that is made in the same way as that of an earlier layer is skipped.

    transformers takes half a millisecond per tensor, and DeepSeek-V3 has 45,000 tensors in 58 equal layers.
    """
    made_from: dict[str, list[str]] = defaultdict(list)
    for name, destination in adapted.destinations.items():
        if destination.parameter:
            made_from[destination.parameter].append(name)
    state = adapted.model.state_dict()
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for parameter, names in made_from.items():
        layer = adapted.layer_of(parameter)
        title = parameter if layer is None else parameter.replace(f"{adapted.layers_prefix}{layer}.", adapted.layers_prefix, 1)
        entries = (adapted.checkpoint.tensors[name] for name in names)
        made = tuple((adapted.destinations[entry.name].pattern, entry.shape, entry.dtype) for entry in entries)
        kinds.setdefault((title, tuple(state[parameter].shape), made), names)
    return [name for names in kinds.values() for name in names]


def _check_conversion(adapted: AdaptedModel) -> None:
    """Let transformers convert tensors without content. Raises InputError for a tensor that it cannot join or fit."""
    tensors = adapted.checkpoint.tensors
    names = _unlike(adapted)
    empty = {name: torch.empty(tensors[name].shape, dtype=TORCH_DTYPES[tensors[name].dtype], device="meta") for name in names}
    config = LoadStateDictConfig(dtype=adapted.model.dtype, device_map={"": "meta"}, weight_mapping=adapted.weight_mapping)  # type: ignore[arg-type]
    info, _ = convert_and_load_state_dict_in_model(adapted.model, empty, config)
    problems = [*info.conversion_errors.items(), *((found[0], f"shape {found[1:]}") for found in info.mismatched_keys)]
    for parameter, problem in problems:
        sources = [name for name, to in adapted.destinations.items() if to.parameter == parameter] or names[:1]
        shape = list(tensors[sources[0]].shape)
        reason = str(problem).strip().splitlines()[-1]
        raise InputError(
            f"{adapted.checkpoint.folder / tensors[sources[0]].file}: tensor {sources[0]} of shape {shape} (and "
            f"{len(sources) - 1} more) cannot become {parameter}: {reason}; {_REMEDY}"
        )
