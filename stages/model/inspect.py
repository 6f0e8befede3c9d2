"""Describes a checkpoint and the sizes of its merged versions, from config and headers alone."""

from collections import defaultdict
from collections.abc import Sequence

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.quantised import quantisation_config
from stages.contracts.errors import InputError
from stages.contracts.inspection import CacheSize, CardFit, CheckpointFacts, ModelFacts, RouterFacts, TargetSize
from stages.contracts.survey import Survey
from stages.model.families import family_name, family_of, groups_in, stock_targets, text_config
from stages.model.kv_cache import kv_cache_bytes
from stages.model.roles import TensorRole
from stages.model.survey import survey

SHARED_EXPERT_FIELDS = (
    "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "shared_expert_intermediate_size",
    "shared_intermediate_size",
)  # fmt: skip
EXPERT_MAP_BYTES = 8
GB = 10**9
CARDS = {
    "T4, RTX 4080": 16, "L4, A10G, RTX 4090": 24, "RTX 5090": 32, "A100 40 GB": 40, "L40S, RTX 6000 Ada": 48,
    "A100, H100 80 GB": 80, "H200": 141, "B200, MI300X": 192, "2 x H100": 160, "4 x H100": 320, "8 x H100": 640,
}  # fmt: skip
"""Nominal memory in gigabytes of common cards."""
_USED = 0.9
"""Share of a card's memory that weights and cache may take. vLLM, for one, plans with as much by default."""


def inspect_checkpoint(folder: str, context: int, batch: int) -> CheckpointFacts:
    """Facts of a checkpoint. context, batch: tokens and sequences that the cache has room for.
    Raises InputError for a folder whose config or headers cannot be read."""
    checkpoint = Checkpoint(folder)
    dtypes: dict[str, int] = defaultdict(int)
    for entry in checkpoint.raw_tensors.values():
        dtypes[entry.dtype] += entry.num_bytes
    reason: str | None = None
    model: ModelFacts | None = None
    try:
        surveyed, roles = survey(checkpoint)
    except InputError as e:
        reason = str(e)
    else:
        cache = CacheSize(context, batch, kv_cache_bytes(checkpoint, context, batch))
        model = _model_facts(checkpoint, surveyed, roles, cache)
    return CheckpointFacts(
        family=family_name(checkpoint.config),
        num_files=len(checkpoint.files),
        total_bytes=checkpoint.total_bytes,
        bytes_by_dtype=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        ignored_files=list(checkpoint.ignored_files),
        reason=reason,
        model=model,
    )


def fitting_cards(targets: Sequence[TargetSize], cache_bytes: int) -> list[CardFit]:
    """What fits on each card beside the cache, smallest card first."""
    fits: list[CardFit] = []
    for name, size in sorted(CARDS.items(), key=lambda item: item[1]):
        room = _USED * size * GB - cache_bytes
        tied = max((one.num_experts for one in targets if one.tied <= room), default=None)
        stock = max((one.num_experts for one in targets if one.stock is not None and one.stock <= room), default=None)
        fits.append(CardFit(name, size * GB, tied, stock))
    return fits


def _model_facts(checkpoint: Checkpoint, surveyed: Survey, roles: list[TensorRole], cache: CacheSize) -> ModelFacts:
    text = text_config(checkpoint.config)
    place = str(checkpoint.folder)
    groups = groups_in(checkpoint.config, place)
    quantisation = quantisation_config(checkpoint.config)
    targets = target_sizes(roles, surveyed.num_experts, stock_targets(checkpoint.config, place))
    return ModelFacts(
        architecture=surveyed.architecture,
        num_layers=surveyed.num_layers,
        moe_layers=list(surveyed.moe_layers),
        num_experts=surveyed.num_experts,
        top_k=surveyed.top_k,
        shared_experts={name: text[name] for name in SHARED_EXPERT_FIELDS if text.get(name)},
        router=RouterFacts(
            score=family_of(checkpoint.config, place).score,
            has_bias=any(role.role == "router" and len(role.entry.shape) == 1 for role in roles),
            num_groups=groups.num_groups if groups else 1,
            num_chosen_groups=groups.num_chosen if groups else 1,
        ),
        num_parameters=surveyed.num_parameters,
        dtype=surveyed.dtype,
        quantisation=quantisation.get("quant_method") if quantisation else None,
        layout=_layout(roles),
        unloaded_tensors=surveyed.unloaded_tensors,
        first_unloaded_tensor=surveyed.first_unloaded_tensor,
        bytes_by_role=bytes_by_role(roles),
        targets=targets,
        cache=cache,
        cards=fitting_cards(targets, cache.bytes),
    )


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


def target_sizes(roles: list[TensorRole], num_experts: int, stock: list[int]) -> list[TargetSize]:
    """Sizes of exports with r experts a layer, for every r from E to 1. stock: those r of which a stock export is possible.

    A quantised source counts as it is packed: exports keep its scheme unless `export.dtype` says otherwise.
    """
    sizes = bytes_by_role(roles)
    fixed = sum(sizes.values()) - sizes["experts"] - sizes["router"] - sizes["mtp"]
    num_maps = len({role.layer for role in roles if role.role in ("expert", "fused_expert")})
    targets: list[TargetSize] = []
    for r in range(num_experts, 0, -1):
        mtp = sizes["mtp"] if r == num_experts else 0
        experts, router = sizes["experts"] * r // num_experts, sizes["router"] * r // num_experts
        tied = fixed + mtp + experts + sizes["router"] + num_maps * num_experts * EXPERT_MAP_BYTES
        targets.append(TargetSize(r, tied, fixed + mtp + experts + router if r in stock else None))
    return targets
