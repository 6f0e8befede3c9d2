"""What transformers does not say about a family and what therefore stands here, stated and tested."""

from collections.abc import Mapping
from typing import Any

from stages.common.errors import InputError

# Names under which a config keeps the number of routed experts, and the number of experts a token is sent to.
EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")

# Families whose router scores experts by a sigmoid of the logits; all others by softmax over the experts.
SIGMOID_ROUTERS = frozenset({"deepseek_v3", "glm4_moe", "dots1", "minimax_m2", "lfm2_moe"})


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a raw config that describes the language model: `text_config` under a multimodal wrapper."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def expert_count_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of the raw language-model config that hold the number of routed experts."""
    text = text_config(config)
    return tuple(name for name in EXPERT_COUNT_FIELDS if isinstance(text.get(name), int))


def num_experts_in(config: Mapping[str, Any], place: str) -> int:
    """Return the number of routed experts. Raises InputError for a model without experts, or with two different counts."""
    text = text_config(config)
    counts = {name: text[name] for name in expert_count_fields(config)}
    if not counts or max(counts.values()) < 2:
        raise InputError(
            f"{place}: {config.get('model_type')!r} is not a Mixture-of-Experts model: its config has no expert count "
            f"(looked for {', '.join(EXPERT_COUNT_FIELDS)}); there are no experts to merge"
        )
    if len(set(counts.values())) > 1:
        raise InputError(f"{place}: the config disagrees with itself about the number of experts: {counts}")
    return int(next(iter(counts.values())))


def top_k_in(config: Mapping[str, Any], place: str) -> int:
    """Return how many experts the router picks for a token. Raises InputError when the config does not say."""
    text = text_config(config)
    for name in TOP_K_FIELDS:
        if isinstance(text.get(name), int):
            return int(text[name])
    raise InputError(f"{place}: the config does not say how many experts a token is sent to ({', '.join(TOP_K_FIELDS)})")
