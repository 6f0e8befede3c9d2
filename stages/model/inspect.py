"""Describes a checkpoint and the sizes of its merged versions, from config and headers alone."""

from collections import defaultdict
from typing import Any

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.quantised import quantisation_config
from stages.contracts.errors import InputError
from stages.contracts.survey import Survey
from stages.model.families import family_name, family_of, groups_in, stock_targets, text_config
from stages.model.roles import TensorRole
from stages.model.survey import survey

SHARED_EXPERT_FIELDS = (
    "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "shared_expert_intermediate_size",
    "shared_intermediate_size",
)  # fmt: skip
EXPERT_MAP_BYTES = 8


def inspect_checkpoint(folder: str) -> dict[str, Any]:
    """Facts of a checkpoint as JSON values, sizes in bytes.

    `reason` is None for a supported checkpoint. Otherwise it states why the checkpoint is not supported, and only facts that
    need no model class are included. Raises InputError for a folder whose config or headers cannot be read.
    """
    checkpoint = Checkpoint(folder)
    dtypes: dict[str, int] = defaultdict(int)
    for entry in checkpoint.raw_tensors.values():
        dtypes[entry.dtype] += entry.num_bytes
    facts: dict[str, Any] = {
        "family": family_name(checkpoint.config),
        "num_files": len(checkpoint.files),
        "total_bytes": checkpoint.total_bytes,
        "bytes_by_dtype": dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        "ignored_files": list(checkpoint.ignored_files),
        "reason": None,
    }
    try:
        surveyed, roles = survey(checkpoint)
    except InputError as e:
        return {**facts, "reason": str(e)}
    return {**facts, **_described(checkpoint, surveyed, roles)}


def _described(checkpoint: Checkpoint, surveyed: Survey, roles: list[TensorRole]) -> dict[str, Any]:
    text = text_config(checkpoint.config)
    place = str(checkpoint.folder)
    family, groups = family_of(checkpoint.config, place), groups_in(checkpoint.config, place)
    has_bias = any(role.role == "router" and len(role.entry.shape) == 1 for role in roles)
    quantisation = quantisation_config(checkpoint.config)
    return {
        "architecture": surveyed.architecture,
        "num_layers": surveyed.num_layers,
        "moe_layers": list(surveyed.moe_layers),
        "num_experts": surveyed.num_experts,
        "top_k": surveyed.top_k,
        "shared_experts": {name: text[name] for name in SHARED_EXPERT_FIELDS if text.get(name)},
        "router": {
            "score": family.score,
            "has_bias": has_bias,
            "num_groups": groups.num_groups if groups else 1,
            "num_chosen_groups": groups.num_chosen if groups else 1,
        },
        "num_parameters": surveyed.num_parameters,
        "dtype": surveyed.dtype,
        "quantisation": quantisation.get("quant_method") if quantisation else None,
        "layout": _layout(roles),
        "unloaded_tensors": surveyed.unloaded_tensors,
        "first_unloaded_tensor": surveyed.first_unloaded_tensor,
        "bytes_by_role": bytes_by_role(roles),
        "targets": target_bytes(roles, surveyed.num_experts, stock_targets(checkpoint.config, place)),
    }


def _layout(roles: list[TensorRole]) -> str:
    kinds = {role.role for role in roles} & {"expert", "fused_expert"}
    names = {"expert": "one tensor for each expert", "fused_expert": "one tensor for all experts"}
    return " and ".join(names[kind] for kind in sorted(kinds))


def bytes_by_role(roles: list[TensorRole]) -> dict[str, int]:
    """Bytes on disk by role: experts, router, attention, embeddings, MTP layers, rest (norms, dense and shared experts)."""
    sizes = dict.fromkeys(("experts", "router", "attention", "embeddings", "mtp", "other"), 0)
    for role in roles:
        name = role.parameter or role.entry.name
        if role.role in ("expert", "fused_expert"):
            kind = "experts"
        elif role.role in ("router", "mtp"):
            kind = role.role
        elif role.layer is None and ("embed" in name or "lm_head" in name):
            kind = "embeddings"
        else:
            kind = "attention" if any("attn" in part or "attention" in part for part in name.split(".")[:-1]) else "other"
        sizes[kind] += role.entry.stored_bytes
    return sizes


def target_bytes(roles: list[TensorRole], num_experts: int, stock: list[int]) -> list[dict[str, int | None]]:
    """For every r from 1 to E: bytes of a tied export, and bytes of a stock export if one is possible.

    A quantised source counts as it is packed: exports keep its scheme unless `export.dtype` says otherwise.
    """
    sizes = bytes_by_role(roles)
    fixed = sum(sizes.values()) - sizes["experts"] - sizes["router"] - sizes["mtp"]
    num_maps = len({role.layer for role in roles if role.role in ("expert", "fused_expert")})
    targets: list[dict[str, int | None]] = []
    for r in range(num_experts, 0, -1):
        mtp = sizes["mtp"] if r == num_experts else 0
        experts, router = sizes["experts"] * r // num_experts, sizes["router"] * r // num_experts
        tied = fixed + mtp + experts + sizes["router"] + num_maps * num_experts * EXPERT_MAP_BYTES
        targets.append({"num_experts": r, "tied": tied, "stock": fixed + mtp + experts + router if r in stock else None})
    return targets
