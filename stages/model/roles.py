"""Role of every tensor on disk in a merge, derived from the meta model and the headers alone."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from stages.checkpoint.headers import TensorEntry
from stages.contracts.errors import InputError
from stages.model.adapter import AdaptedModel, Destination, expert_axes
from stages.model.expert_weights import ExpertsLayout, ExpertWeights
from stages.model.families import MTP_FIELDS, mtp_fields, num_experts_in
from stages.model.products import gate_order


@dataclass(frozen=True)
class TensorRole:
    """Role of a tensor on disk.

    parameter: the transformers parameter or buffer it becomes part of; empty when transformers does not load it. layer: decoder
    layer, or None outside the layers; where `like` is set, the number of the layer that predicts further tokens, counted on
    from the decoder layers. role: "copy", "expert" (one expert's), "fused_expert" (all experts'), "router" (any other with an
    expert axis) or "mtp" (of the layers that predict further tokens). A tensor that transformers does not load is "copy",
    unless it is of such layers. expert, template: for "expert", its index, and its name with {} in place of the index.
    expert_axis: for "fused_expert" and "router". neuron_axis: axis of the neurons in one expert's part, if the values belong to
    neurons. neuron_order: "single" if the axis has one value per neuron. With two values, of gate and up: "halves" if all gates
    come first, "interleaved" if they alternate. like: for "mtp", role of the tensor in the same place of the last MoE layer
    ("expert", "fused_expert" or "router"), with expert, template and expert_axis as there; empty for any other tensor.
    """

    entry: TensorEntry
    parameter: str
    layer: int | None
    role: str
    expert: int | None = None
    expert_axis: int | None = None
    template: str | None = None
    neuron_axis: int | None = None
    neuron_order: str = ""
    like: str = ""


def tensor_roles(adapted: AdaptedModel) -> list[TensorRole]:
    """Role of every tensor on disk, in the order of the checkpoint's files and bytes.

    Raises InputError, naming file and tensor, if the names do not account for every expert exactly once.
    """
    axes = expert_axes(adapted.checkpoint)
    num_experts = num_experts_in(adapted.checkpoint.config, str(adapted.checkpoint.folder))
    inside_experts = _experts_parameters(adapted)
    per_expert = _per_expert_names(adapted, axes, num_experts)
    blocks = _moe_blocks(adapted)
    neurons = neuron_axes(adapted)
    roles: list[TensorRole] = []
    for name, entry in adapted.checkpoint.tensors.items():
        destination = adapted.destinations[name]
        parameter = destination.parameter
        layer = adapted.layer_of(parameter)
        if not parameter:
            roles.append(TensorRole(entry, "", None, "mtp" if _is_mtp(adapted, entry, destination, blocks) else "copy"))
        elif name in per_expert:
            expert, template = per_expert[name]
            role = TensorRole(entry, parameter, layer, "expert", expert=expert, template=template)
            roles.append(_with_neurons(role, entry.shape, neurons.get(parameter), adapted))
        elif parameter in axes:
            axis = axes[parameter]
            if len(entry.shape) <= axis or entry.shape[axis] != num_experts:
                raise InputError(
                    f"{adapted.checkpoint.folder / entry.file}: tensor {name} has shape {list(entry.shape)}; "
                    f"axis {axis} must have {num_experts} experts: restore the config, or download the checkpoint again"
                )
            if parameter in inside_experts:
                role = TensorRole(entry, parameter, layer, "fused_expert", expert_axis=axis)
                shape = (*entry.shape[:axis], *entry.shape[axis + 1 :])
                roles.append(_with_neurons(role, shape, neurons.get(parameter), adapted))
            else:
                roles.append(TensorRole(entry, parameter, layer, "router", expert_axis=axis))
        else:
            roles.append(TensorRole(entry, parameter, layer, "copy"))
    return _with_likes(roles, len(adapted.layers))


def _with_likes(roles: list[TensorRole], num_layers: int) -> list[TensorRole]:
    """Roles in which those of layers that predict further tokens know what they are like in the last MoE layer. These layers
    are numbered by their prefixes, from num_layers on."""
    last = max((role.layer for role in roles if role.role == "router" and role.layer is not None), default=None)
    tails: dict[str, TensorRole] = {}
    for role in roles:
        _, found, tail = role.entry.name.partition(f".{last}.")
        if role.layer == last and found and role.role in ("expert", "fused_expert", "router"):
            tails[tail] = role
    liked = [_with_like(role, tails) if role.role == "mtp" else (role, ()) for role in roles]
    prefixes = sorted({prefix for _, prefix in liked if prefix}, key=lambda prefix: [(len(part), part) for part in prefix])
    numbers = {prefix: number for number, prefix in enumerate(prefixes, num_layers)}
    return [replace(role, layer=numbers[prefix]) if prefix else role for role, prefix in liked]


def _with_like(role: TensorRole, tails: Mapping[str, TensorRole]) -> tuple[TensorRole, tuple[str, ...]]:
    """A role of a layer that predicts further tokens, and the parts of the layer's prefix; none if nothing is like it. tails:
    roles of the last MoE layer by name without the layer's prefix."""
    parts = role.entry.name.split(".")
    for start in range(1, len(parts)):
        found = tails.get(".".join(parts[start:]))
        if found is not None and found.entry.shape == role.entry.shape:
            template = None
            if found.template is not None:
                own = len(found.template.split(".")) - (len(parts) - start)
                template = ".".join([*parts[:start], *found.template.split(".")[own:]])
            like = replace(role, like=found.role, expert=found.expert, template=template, expert_axis=found.expert_axis)
            return like, tuple(parts[:start])
    return role, ()


@dataclass(frozen=True)
class Neurons:
    """Neurons in one expert's part of a parameter: their axis, their number, and the order of gate and up if it has both."""

    axis: int
    number: int
    order: str


def neuron_axes(adapted: AdaptedModel) -> dict[str, Neurons]:
    """Neuron axes of all parameters of experts modules whose values belong to neurons: all but the bias of W_down."""
    found: dict[str, Neurons] = {}
    for index, experts in adapted.experts_modules().items():
        layout, size = ExpertsLayout.of(experts), ExpertWeights(experts).intermediate
        order = gate_order(experts) if layout.has_gate else "single"
        axes = {
            layout.first: (1 if layout.is_transposed else 0, order),
            "down_proj": (0 if layout.is_transposed else 1, "single"),
        }
        if layout.has_bias:
            axes[f"{layout.first}_bias"] = (0, order)
        for name in _names_under(adapted.model, experts, f"{adapted.layers_prefix}{index}."):
            if (parameter := name.rsplit(".", 1)[-1]) in axes:
                axis, order_of = axes[parameter]
                found[name] = Neurons(axis, size, order_of)
    return found


def _with_neurons(role: TensorRole, shape: tuple[int, ...], neurons: Neurons | None, adapted: AdaptedModel) -> TensorRole:
    """A role with its neuron axis added. shape: shape of one expert's part on disk, with gate and up together or separate.

    Raises InputError if the axis has the wrong size, which shows that transformers transposes the tensor on loading.
    """
    if neurons is None:
        return role
    sizes = {neurons.number: "single", 2 * neurons.number: neurons.order}
    order = sizes.get(shape[neurons.axis], "") if neurons.axis < len(shape) else ""
    if not order:
        raise InputError(
            f"{adapted.checkpoint.folder / role.entry.file}: tensor {role.entry.name} has shape {list(role.entry.shape)}; axis "
            f"{neurons.axis} of an expert's part must have its {neurons.number} neurons, once or twice: restore the config, "
            f"or download the checkpoint again"
        )
    return replace(role, neuron_axis=neurons.axis, neuron_order=order)


def _is_mtp(adapted: AdaptedModel, entry: TensorEntry, destination: Destination, blocks: tuple[str, ...]) -> bool:
    """Whether a tensor that transformers does not load belongs to a layer that predicts further tokens.

    blocks: prefixes of the modules around experts and routers. Raises InputError for a layer that the config does not declare,
    and for a tensor that looks like part of experts or routers but is no part of the model: a merge could not adapt it to the
    merged experts. Any other tensor is safe to copy, since transformers ignores it.
    """
    place = f"{adapted.checkpoint.folder / entry.file}: tensor {entry.name}"
    if any(part.startswith(("mtp", "nextn")) for part in entry.name.split(".")):
        return True
    layer, num_layers = adapted.layer_of(destination.renamed), len(adapted.layers)
    is_ignored = destination.renamed in adapted.ignored
    if layer is not None and layer >= num_layers:
        if not mtp_fields(adapted.checkpoint.config) and not is_ignored:
            raise InputError(
                f"{place} belongs to layer {layer} but config.json has {num_layers} layers and none of "
                f"{', '.join(MTP_FIELDS)}; config and weights do not belong together: download the checkpoint again"
            )
        return True
    is_of_experts = "expert" in entry.name if layer is not None else ".experts." in entry.name
    if is_of_experts or (destination.renamed.startswith(blocks) and not is_ignored):
        raise InputError(
            f"{place} is no part of {type(adapted.model).__name__}; config and weights do not belong together: "
            f"download the checkpoint again"
        )
    return False


def _moe_blocks(adapted: AdaptedModel) -> tuple[str, ...]:
    """Prefix of the module around the experts of every MoE layer, with a trailing dot."""
    names = {module: name for name, module in adapted.model.named_modules()}
    return tuple(f"{names[experts].rpartition('.')[0]}." for experts in adapted.experts_modules().values())


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
    """Expert index and name template of every tensor that contains one expert's part of a parameter."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, destination in adapted.destinations.items():
        if destination.parameter in axes and destination.pattern is not None and "*" in destination.pattern:
            groups[destination.parameter, destination.pattern].append(name)
    found: dict[str, tuple[int, str]] = {}
    for (parameter, _), names in groups.items():
        parts = [name.split(".") for name in names]
        places = [i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1]
        indices = {part[places[0]] for part in parts} if len(places) == 1 and len(set(map(len, parts))) == 1 else set()
        due = {str(expert) for expert in range(num_experts)}
        if indices != due or len(names) != num_experts or "{" in names[0] or "}" in names[0]:
            odd = next((name for name in names if not set(name.split(".")) & due), names[0])
            missing = sorted(due - indices, key=int)
            lacking = ", ".join(missing) or "none, some are doubled"
            raise InputError(
                f"{adapted.checkpoint.folder}: {parameter} needs one tensor for each of {num_experts} experts but "
                f"{len(names)} are there (such as {odd}); missing experts: {lacking}; download the checkpoint again"
            )
        shapes = {adapted.checkpoint.tensors[name].shape for name in names}
        dtypes = {adapted.checkpoint.tensors[name].dtype for name in names}
        if len(shapes) > 1 or len(dtypes) > 1:
            raise InputError(
                f"{adapted.checkpoint.folder}: the experts of {parameter} differ in shape {sorted(shapes)} "
                f"or dtype {sorted(dtypes)}; download the checkpoint again"
            )
        for name, part in zip(names, parts, strict=True):
            template = ".".join([*part[: places[0]], "{}", *part[places[0] + 1 :]])
            found[name] = (int(part[places[0]]), template)
    return found


def router_modules(adapted: AdaptedModel, roles: Iterable[TensorRole]) -> dict[int, nn.Module]:
    """For every MoE layer, the module that contains the router's weight [E, D] and returns the logits first."""
    routers = {}
    for role in roles:
        if role.role == "router" and len(role.entry.shape) == 2 and role.expert_axis == 0 and role.layer is not None:
            routers[role.layer] = adapted.model.get_submodule(role.parameter.rsplit(".", 1)[0])
    return routers
