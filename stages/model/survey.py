"""Surveys a checkpoint: its dimensions, sizes and tensors, from config and headers alone."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.schemes import Scheme
from stages.contracts.errors import InputError
from stages.contracts.survey import Survey
from stages.contracts.tensors import TensorRow
from stages.model.adapter import AdaptedModel, checkpoint_dtype
from stages.model.completeness import check_complete
from stages.model.config_checks import check_config
from stages.model.families import family_name, family_of, num_experts_in, number_in, text_config, top_k_in
from stages.model.packed import packed_parts
from stages.model.roles import TensorRole, router_modules, tensor_roles
from stages.model.tied import is_tied
from stages.model.trial import check_experts, check_forward

FLOATING = ("F64", "F32", "F16", "BF16")
MERGED = ("expert", "fused_expert", "router")


def survey(checkpoint: Checkpoint) -> tuple[Survey, list[TensorRole]]:
    """The survey of a checkpoint and the role of each of its tensors.

    Raises InputError for a checkpoint that is not MoE, is incomplete or inconsistent, or is of an unsupported family.
    """
    place = str(checkpoint.folder)
    family_of(checkpoint.config, place)
    check_config(checkpoint)
    if is_tied(checkpoint.config):
        raise InputError(f"{place} is itself a tied export; merge the checkpoint that it was made from")
    num_experts = num_experts_in(checkpoint.config, place)
    top_k = top_k_in(checkpoint.config, place)
    adapted = AdaptedModel(checkpoint)
    check_complete(adapted)
    check_experts(adapted)
    check_forward(checkpoint)
    roles = tensor_roles(adapted)
    for role in roles:
        if (role.like or role.role) in MERGED and role.entry.dtype not in FLOATING:
            raise InputError(
                f"{checkpoint.folder / role.entry.file}: tensor {role.entry.name} is {role.entry.dtype}; "
                f"only {', '.join(FLOATING)} can be averaged: use the checkpoint from before quantisation"
            )
    _check_packed_alike(checkpoint, roles)
    moe_layers = sorted(adapted.experts_modules())
    routers = router_modules(adapted, roles)
    if not moe_layers or moe_layers != sorted(routers):
        raise InputError(
            f"{place}: {checkpoint.config['model_type']} keeps its experts or routers in a way that is not supported "
            f"(layers with experts: {moe_layers}, with routers: {sorted(routers)}); report the family"
        )
    names = {module: name for name, module in adapted.model.named_modules()}
    layer_bytes: dict[int | None, int] = defaultdict(int)
    expert_bytes: dict[int | None, int] = defaultdict(int)
    for role in roles:
        if role.parameter:
            layer_bytes[role.layer] += role.entry.num_bytes
        if role.role in ("expert", "fused_expert"):
            expert_bytes[role.layer] += role.entry.num_bytes
    experts = {role.parameter for role in roles if role.role in ("expert", "fused_expert")}
    saved_bytes: dict[int | None, int] = defaultdict(int)
    for parameter, parts in packed_parts(adapted, checkpoint.tensors, experts).items():
        saved_bytes[adapted.layer_of(parameter)] += sum(one.entry.num_bytes - one.entry.stored_bytes for one in parts)
    text = text_config(checkpoint.config)
    mtp = [role for role in roles if role.role == "mtp"]
    unloaded = [role for role in roles if role.role == "copy" and not role.parameter]
    surveyed = Survey(
        family=family_name(checkpoint.config),
        architecture=type(adapted.model).__name__,
        num_layers=len(adapted.layers),
        moe_layers=tuple(moe_layers),
        routers={layer: names[router] for layer, router in sorted(routers.items())},
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=_needed(text, "hidden_size", place),
        vocab_size=_needed(text, "vocab_size", place),
        max_positions=number_in(text, "max_position_embeddings", place),
        dtype=str(checkpoint_dtype(checkpoint)).removeprefix("torch."),
        num_parameters=sum(role.entry.num_elements for role in roles),
        total_bytes=checkpoint.total_bytes,
        mtp_tensors=len(mtp),
        first_mtp_tensor=_first_place(checkpoint, mtp),
        unloaded_tensors=len(unloaded),
        first_unloaded_tensor=_first_place(checkpoint, unloaded),
        ignored_files=tuple(checkpoint.ignored_files),
        outside_bytes=layer_bytes[None],
        layer_bytes=tuple(layer_bytes[layer] for layer in range(len(adapted.layers))),
        layer_expert_bytes=tuple(expert_bytes[layer] for layer in range(len(adapted.layers))),
        layer_held_bytes=tuple(layer_bytes[layer] - saved_bytes[layer] for layer in range(len(adapted.layers))),
    )
    return surveyed, roles


def _check_packed_alike(checkpoint: Checkpoint, roles: list[TensorRole]) -> None:
    """Raise InputError where some experts of a parameter are packed and others are not, or routers are packed: a merged expert
    takes the place of any of them, and has to be packed like it."""
    packed: dict[str, Scheme | None] = {}
    for role in roles:
        place = f"{checkpoint.folder / role.entry.file}: tensor {role.entry.name}"
        scheme = role.entry.packing.scheme if role.entry.packing else None
        kind = role.like or role.role
        if kind == "router" and scheme is not None:
            raise InputError(
                f"{place}: a router that is quantised is not supported; use the checkpoint from before quantisation"
            )
        if kind == "fused_expert" and scheme is not None and role.expert_axis != 0:
            raise InputError(
                f"{place}: experts that are packed along axis {role.expert_axis} are not supported; use the "
                f"checkpoint from before quantisation"
            )
        if kind == "expert" and role.template is not None and packed.setdefault(role.template, scheme) != scheme:
            raise InputError(
                f"{place} is packed in another way than the same tensor of other experts; use the checkpoint from before "
                f"quantisation"
            )


def _needed(text: Mapping[str, Any], name: str, place: str) -> int:
    value = number_in(text, name, place)
    if value is None:
        raise InputError(f"{place}: config.json has no {name}; restore the config")
    return value


def survey_checkpoint(model: str) -> tuple[Survey, list[TensorRow]]:
    """The survey of a checkpoint folder and a row for each of its stored tensors. Raises InputError as `survey` does."""
    checkpoint = Checkpoint(model)
    surveyed, roles = survey(checkpoint)
    rows = {row.name: row for role in roles for row in _rows(role)}
    return surveyed, [rows[name] for name in checkpoint.raw_tensors]


def _rows(role: TensorRole) -> Iterator[TensorRow]:
    """A row for each tensor that is stored for one as the model sees it."""
    packing = role.entry.packing
    for part, entry in packing.parts.items() if packing else [("", role.entry)]:
        template = role.template
        if template is not None and part:  # the part's name differs from that of the values behind the expert's index
            before = template.split("{}", 1)[0]
            template = before + "{}" + entry.name.removeprefix(f"{before}{role.expert}")
        yield TensorRow(
            name=entry.name,
            file=entry.file,
            dtype=entry.dtype,
            shape=entry.shape,
            num_bytes=entry.num_bytes,
            parameter=role.parameter,
            layer=role.layer,
            role=role.role,
            expert=role.expert,
            expert_axis=role.expert_axis,
            template=template,
            neuron_axis=role.neuron_axis,
            neuron_order=role.neuron_order,
            scheme=packing.scheme.name if packing else "",
            part=part,
            values=role.entry.name,
            values_template=role.template,
            values_shape=role.entry.shape,
            like=role.like,
        )


def _first_place(checkpoint: Checkpoint, roles: list[TensorRole]) -> str | None:
    """Name of the first of some tensors for messages, with its file; None if there are none."""
    return f"{checkpoint.folder / roles[0].entry.file}: tensor {roles[0].entry.name}" if roles else None
