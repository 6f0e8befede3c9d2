"""transformers as the model adapter: a model without weights, and what each tensor on disk is to it.

Semi-private names of transformers are used here and in `layer_shard.py` only; `tests/stages/test_contract.py` checks
them against the installed version.
"""

import importlib.util
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from stages.common.checkpoint import Checkpoint, TensorEntry
from stages.common.errors import InputError
from stages.common.families import EXPERT_COUNT_FIELDS, num_experts_in
from stages.common.tied import MODELING_FILE, is_tied, modeling_source

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorRole:
    """What a tensor on disk is to the model.

    parameter: the transformers parameter or buffer it becomes part of; empty when transformers does not load it.
    layer: decoder layer, or None outside of the layers.
    role: "copy", "expert" (one expert's), "fused_expert" (all experts') or "router" (anything else with an expert axis).
    expert, template: for "expert", its index and the name with {} in the index's place.
    expert_axis: for "fused_expert" and "router".
    """

    entry: TensorEntry
    parameter: str
    layer: int | None
    role: str
    expert: int | None = None
    expert_axis: int | None = None
    template: str | None = None


def checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype the model computes in: the config's, else that of most of the checkpoint's floating-point bytes."""
    text = checkpoint.config.get("text_config") or {}
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or text.get("dtype")
    if isinstance(named, str) and isinstance(getattr(torch, named.removeprefix("torch."), None), torch.dtype):
        return getattr(torch, named.removeprefix("torch."))  # type: ignore[no-any-return]
    num_bytes: dict[str, int] = defaultdict(int)
    for entry in checkpoint.tensors.values():
        if entry.dtype in ("F64", "F32", "F16", "BF16"):
            num_bytes[entry.dtype] += entry.num_bytes
    if not num_bytes:
        raise InputError(f"{checkpoint.folder} holds no floating-point tensor")
    return TORCH_DTYPES[max(num_bytes, key=lambda name: num_bytes[name])]


def _load_config(checkpoint: Checkpoint) -> Any:
    if checkpoint.config.get("auto_map") and not is_tied(checkpoint.config):
        raise InputError(
            f"{checkpoint.folder}: its config asks for code of its own (auto_map), which is not run; "
            f"use a checkpoint that transformers {transformers.__version__} loads by itself"
        )
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise InputError(
            f"{checkpoint.folder}: transformers {transformers.__version__} does not read this config "
            f"(model_type {checkpoint.config['model_type']!r}): {e}"
        ) from e


def _tied_class(checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The model class of a tied checkpoint that we wrote. Its file is run only if it is, to the byte, what we write."""
    path = checkpoint.folder / MODELING_FILE
    if path.read_text() != modeling_source(checkpoint.config):
        raise InputError(f"{path} is not the file that this version writes for a tied checkpoint; it is not run")
    spec = importlib.util.spec_from_file_location("modeling_hcsmoe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HCSMoEForCausalLM  # type: ignore[no-any-return]


def build_meta_model(checkpoint: Checkpoint, num_experts: int | None = None) -> PreTrainedModel:
    """Build the model's modules on the meta device: shapes and code, no weights.

    num_experts: if given, build it with this number of routed experts instead of the config's.
    """
    transformers.utils.logging.disable_progress_bar()
    config = _load_config(checkpoint)
    if num_experts is not None:
        text = config.get_text_config()
        for name in EXPERT_COUNT_FIELDS:
            if getattr(text, name, None) is not None:
                setattr(text, name, num_experts)
    dtype = checkpoint_dtype(checkpoint)
    try:
        with torch.device("meta"):
            if is_tied(checkpoint.config):
                model = _tied_class(checkpoint)._from_config(config, dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError) as e:
        raise InputError(f"{checkpoint.folder}: transformers cannot build this model: {e}") from e
    return model.eval()  # type: ignore[no-any-return]


def expert_axes(checkpoint: Checkpoint) -> dict[str, int]:
    """Axis of the experts of every parameter that has one.

    Derived, not listed: the shapes of two models whose configs differ in nothing but the expert count.
    """
    num_experts = num_experts_in(checkpoint.config, str(checkpoint.folder))
    ours = {name: tensor.shape for name, tensor in build_meta_model(checkpoint).state_dict().items()}
    other = build_meta_model(checkpoint, 2 * num_experts).state_dict()
    axes = {}
    for name, shape in ours.items():
        differing = [axis for axis in range(len(shape)) if shape[axis] != other[name].shape[axis]]
        if differing:
            (axes[name],) = differing
            assert shape[axes[name]] == num_experts, name
    return axes


class AdaptedModel:
    """A checkpoint and the meta model that it fills.

    Attributes: `checkpoint`, `model` (on meta), `weight_mapping` (transformers' conversions from disk to module).
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model = build_meta_model(checkpoint)
        self.weight_mapping = get_model_conversion_mapping(self.model)

    @cached_property
    def decoder(self) -> nn.Module:
        """The module that owns the decoder layers."""
        return self.model.get_decoder()  # type: ignore[no-any-return]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.decoder.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    @cached_property
    def layers_prefix(self) -> str:
        """Name of the decoder layers in the state dict, with a trailing dot."""
        for name, module in self.model.named_modules():
            if module is self.decoder:
                return f"{name}.layers." if name else "layers."
        raise AssertionError("the decoder is not part of the model")

    def layer_of(self, parameter: str) -> int | None:
        """Decoder layer of a parameter, or None."""
        if not parameter.startswith(self.layers_prefix):
            return None
        return int(parameter[len(self.layers_prefix) :].split(".", 1)[0])

    @cached_property
    def targets(self) -> dict[str, tuple[str, str | None]]:
        """For every tensor on disk: the parameter it becomes part of ("" if none) and the converter pattern it matched."""
        renamings = [entry for entry in self.weight_mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.weight_mapping if isinstance(entry, WeightConverter)]
        state = self.model.state_dict()
        targets: dict[str, tuple[str, str | None]] = {}
        for name in self.checkpoint.tensors:
            renamed, pattern = rename_source_key(name, renamings, converters, self.model.base_model_prefix, state)
            if renamed not in state and name in state:
                renamed, pattern = name, None
            targets[name] = (renamed if renamed in state else "", pattern)
        return targets

    def experts_modules(self) -> dict[int, nn.Module]:
        """The experts module of every MoE layer."""
        found = {}
        for index, layer in enumerate(self.layers):
            for name, module in layer.named_modules():
                if name.rsplit(".", 1)[-1] == "experts" and hasattr(module, "num_experts"):
                    found[index] = module
        return found

    def check_complete(self) -> None:
        """Check from headers alone that the checkpoint fills the model: nothing missing, nothing of another size.

        Raises InputError naming file and tensor. A per-expert tensor counts as its share of the parameter it joins.
        """
        state = self.model.state_dict()
        found: dict[str, int] = defaultdict(int)
        for name, (parameter, _) in self.targets.items():
            found[parameter] += self.checkpoint.tensors[name].num_elements
        merged_from = self._converted_targets()
        tied = set(self.model.all_tied_weights_keys)
        for parameter, tensor in state.items():
            if parameter in tied and not found[parameter]:
                continue
            sources = merged_from.get(parameter, parameter)
            due, have = (sum(math.prod(state[p].shape) for p in sources), found[sources[0]]) if isinstance(
                sources, tuple
            ) else (math.prod(tensor.shape), found[parameter])  # fmt: skip
            if have == due:
                continue
            names = [name for name, target in self.targets.items() if target[0] == parameter]
            where = f"tensor {names[0]} (and {len(names) - 1} more)" if names else "no tensor"
            raise InputError(
                f"{self.checkpoint.folder}: {where} fills {parameter} with {have:,} values where the config asks for "
                f"{list(tensor.shape)} = {due:,}; config and weights do not belong together, or a file is missing"
            )

    def _converted_targets(self) -> dict[str, tuple[str, ...]]:
        """Parameters that one converter makes together (one tensor split in several): each maps to the whole group."""
        state = self.model.state_dict()
        groups: dict[str, tuple[str, ...]] = {}
        for converter in self.weight_mapping:
            if isinstance(converter, WeightConverter) and len(converter.target_patterns) > 1:
                first, *others = converter.target_patterns
                for parameter in state:
                    if first in parameter:
                        group = (parameter, *(parameter.replace(first, other) for other in others))
                        if all(name in state for name in group):
                            groups |= dict.fromkeys(group, group)
        return groups


def tensor_roles(adapted: AdaptedModel) -> list[TensorRole]:
    """What every tensor on disk is, in the order of the checkpoint's files and bytes.

    Raises InputError, naming file and tensor, where the names do not account for every expert exactly once.
    """
    axes = expert_axes(adapted.checkpoint)
    num_experts = num_experts_in(adapted.checkpoint.config, str(adapted.checkpoint.folder))
    inside_experts = _experts_parameters(adapted)
    per_expert = _per_expert_names(adapted, axes, num_experts)
    roles = []
    for name, entry in adapted.checkpoint.tensors.items():
        parameter, _ = adapted.targets[name]
        layer = adapted.layer_of(parameter)
        if name in per_expert:
            expert, template = per_expert[name]
            roles.append(TensorRole(entry, parameter, layer, "expert", expert=expert, template=template))
        elif parameter in axes:
            axis = axes[parameter]
            if len(entry.shape) <= axis or entry.shape[axis] != num_experts:
                raise InputError(
                    f"{adapted.checkpoint.folder / entry.file}: tensor {name} has shape {list(entry.shape)}; "
                    f"axis {axis} must have {num_experts} experts"
                )
            role = "fused_expert" if parameter in inside_experts else "router"
            roles.append(TensorRole(entry, parameter, layer, role, expert_axis=axis))
        else:
            roles.append(TensorRole(entry, parameter, layer, "copy"))
    return roles


def _experts_parameters(adapted: AdaptedModel) -> set[str]:
    return {
        name
        for index, experts in adapted.experts_modules().items()
        for name in _names_under(adapted.model, experts, f"{adapted.layers_prefix}{index}.")
    }


def _names_under(model: nn.Module, module: nn.Module, prefix: str) -> Iterable[str]:
    for name, candidate in model.named_modules():
        if candidate is module and name.startswith(prefix):
            return [f"{name}.{parameter}" for parameter in module.state_dict()]
    raise AssertionError(f"no module under {prefix}")


def _per_expert_names(adapted: AdaptedModel, axes: Mapping[str, int], num_experts: int) -> dict[str, tuple[int, str]]:
    """Expert index and name template of every tensor that holds one expert's part of a parameter."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, (parameter, pattern) in adapted.targets.items():
        if parameter in axes and pattern is not None and "*" in pattern:
            groups[parameter, pattern].append(name)
    found: dict[str, tuple[int, str]] = {}
    for (parameter, _), names in groups.items():
        parts = [name.split(".") for name in names]
        places = [i for i in range(len(parts[0])) if len({part[i] for part in parts}) > 1]
        indices = sorted(int(part[places[0]]) for part in parts) if len(places) == 1 else []
        if indices != list(range(num_experts)):
            missing = sorted(set(range(num_experts)) - set(indices))
            raise InputError(
                f"{adapted.checkpoint.folder}: {parameter} needs one tensor for each of {num_experts} experts but "
                f"{len(names)} are there (such as {names[0]}); missing experts: {missing or 'none, some are doubled'}"
            )
        shapes = {adapted.checkpoint.tensors[name].shape for name in names}
        dtypes = {adapted.checkpoint.tensors[name].dtype for name in names}
        if len(shapes) > 1 or len(dtypes) > 1:
            raise InputError(
                f"{adapted.checkpoint.folder}: the experts of {parameter} differ in shape {sorted(shapes)} "
                f"or dtype {sorted(dtypes)}"
            )
        for name, part in zip(names, parts, strict=True):
            template = ".".join([*part[: places[0]], "{}", *part[places[0] + 1 :]])
            found[name] = (int(part[places[0]]), template)
    return found


def router_modules(adapted: AdaptedModel, roles: Iterable[TensorRole]) -> dict[int, nn.Module]:
    """The module of every MoE layer that owns the router's weight [E, D] and returns the logits first."""
    routers = {}
    for role in roles:
        if role.role == "router" and len(role.entry.shape) == 2 and role.expert_axis == 0 and role.layer is not None:
            routers[role.layer] = adapted.model.get_submodule(role.parameter.rsplit(".", 1)[0])
    return routers


def copy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of a raw config that may be edited."""
    return deepcopy(dict(config))


def has_modeling_file(folder: Path) -> bool:
    """Whether a checkpoint folder is one of our tied exports."""
    return (folder / MODELING_FILE).exists()
