"""Facts about model families that transformers does not provide, stated here and tested.

A family is a `model_type` of a language model. `docs/families.md` shows this table to users; a test keeps the two equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stages.contracts.errors import InputError
from stages.io.untrusted import shown

# Config names of the number of routed experts, and of the number of experts per token.
EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
TOP_K_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
GROUP_COUNT_FIELDS = ("n_group", "num_expert_group")
CHOSEN_GROUPS_FIELD = "topk_group"
# Config names of the number of layers that predict further tokens (MTP), which transformers does not load.
MTP_FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")


@dataclass(frozen=True)
class Family:
    """One family's facts.

    score: how the router turns logits into scores: "softmax" over the experts or "sigmoid" of each. group_scores: for a router
    that first picks groups of experts, number of best scores in a group that rank it; 0 without groups. gates_input: the gate
    multiplies the expert's input, and the experts get one block of rows each. normalises_outputs: a norm stands between the
    experts' outputs and the residual stream, so that a refit cannot solve for them. rerouting: why its logits alone do not tell
    which experts a token would use if there were fewer; empty where they do. refused_settings: settings of the config
    that must be absent, false or zero, with the reason.
    """

    score: str = "softmax"
    group_scores: int = 0
    gates_input: bool = False
    normalises_outputs: bool = False
    rerouting: str = ""
    refused_settings: Mapping[str, str] = field(default_factory=dict)


_SOFTMAX, _SIGMOID, _GROUPS = Family(), Family("sigmoid"), Family("sigmoid", group_scores=2)
_SIGMOID_NORMED, _GROUPS_NORMED = replace(_SIGMOID, normalises_outputs=True), replace(_GROUPS, normalises_outputs=True)

SUPPORTED: dict[str, Family] = {
    "afmoe": _SIGMOID_NORMED,
    "aria_text": _SOFTMAX,
    "axk1": _GROUPS_NORMED,
    "axk2": _GROUPS,
    "bailing_hybrid": _GROUPS,
    "beam": _GROUPS_NORMED,
    "cohere2_moe": _SOFTMAX,
    "deepseek_v2": Family(group_scores=1),
    "deepseek_v3": _GROUPS,
    "deepseek_v32": _GROUPS,
    "dots1": _GROUPS,
    "dots3_note_text": _GROUPS,
    "ernie4_5_moe": _SOFTMAX,
    "exaone_moe": _GROUPS,
    "flex_olmo": Family(normalises_outputs=True),
    "flint": _SIGMOID,
    "gemma4_text": Family(
        normalises_outputs=True,
        rerouting="each expert has a factor of its own in its gates",
        refused_settings={
            "num_kv_shared_layers": "its last layers reuse keys and values of earlier ones, which layer shards do not pass on",
            "hidden_size_per_layer_input": "every layer has its own embedding of the tokens, which layer shards do not pass on",
        },
    ),
    "glm4_moe": _GROUPS,
    "glm4_moe_lite": _GROUPS,
    "gpt_oss": _SOFTMAX,
    "granitemoe": _SOFTMAX,
    "granitemoe_swa": _SOFTMAX,
    "granitemoehybrid": _SOFTMAX,
    "granitemoeshared": _SOFTMAX,
    "hunyuan_v1_moe": _SOFTMAX,
    "hy_v3": _SIGMOID,
    "jamba": _SOFTMAX,
    "kimi_linear": _GROUPS,
    "kolibri1": _SIGMOID_NORMED,
    "laguna": Family(
        "sigmoid",
        refused_settings={"moe_apply_router_weight_on_input": "its gate multiplies the expert's input, which is not tested"},
    ),
    "lfm2_moe": _SIGMOID,
    "llama4_text": Family("sigmoid", gates_input=True),
    "mellum": _SOFTMAX,
    "mimo_v2_flash": _GROUPS,
    "minimax": _SOFTMAX,
    "minimax_m2": _SIGMOID,
    "minimax_m3_vl_text": _SIGMOID,
    "mixtral": _SOFTMAX,
    "nemotron_h": _GROUPS,
    "olmoe": _SOFTMAX,
    "phimoe": Family(rerouting="its second gate is made of what the first pick leaves"),
    "qwen2_moe": _SOFTMAX,
    "qwen3_5_moe_text": _SOFTMAX,
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "solar_open": _GROUPS,
}

REFUSED: dict[str, str] = {
    "dbrx": "it keeps all experts of a layer in one matrix without an axis of experts",
    "deepseek_v4": "its first routers choose experts by token id and its layers pass several streams on",
    "doge": "its experts are single rows that are found by product keys, without a router row each",
    "glm_moe_dsa": "its layers pass their choice of tokens on to later layers",
    "hy_v4": "its layers pass their choice of tokens on to later layers",
    "inkling_text": "its router has rows for shared experts among those of the routed ones",
    "inkling2_text": "its layers read the outputs of several earlier layers",
    "jetmoe": "it routes attention heads as well as feed-forward experts",
    "longcat_flash": "its router has rows for experts that compute nothing among those of the others",
    "qwen4_exp_text": "its layers pass several streams on and look n-grams of token ids up",
    "zaya": "its router has a row that skips all experts, and hands its state on from layer to layer",
}

# Multimodal models. Their language model is merged and everything else is copied.
WRAPPERS: dict[str, str] = {"llama4": "llama4_text", "qwen3_5_moe": "qwen3_5_moe_text"}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a raw config that describes the language model: `text_config` under a multimodal wrapper."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def family_name(config: Mapping[str, Any]) -> str:
    """The family of a raw config's language model."""
    named = text_config(config).get("model_type")
    return named if isinstance(named, str) and named else WRAPPERS.get(config["model_type"], config["model_type"])


def family_of(config: Mapping[str, Any], place: str) -> Family:
    """Facts of a raw config's family. Raises InputError, with the reason, for an unsupported family."""
    for part in ("text_config", "quantization_config"):
        if not isinstance(config.get(part), dict | None):
            raise InputError(
                f"{place}/config.json: {part} is {shown(repr(config[part]))} where an object is needed; restore the config"
            )
    name, model_type = family_name(config), config["model_type"]
    if name in REFUSED:
        raise InputError(f"{place}: {name} is not supported: {REFUSED[name]}; use one of docs/families.md")
    if name not in SUPPORTED:
        raise InputError(
            f"{place}: {shown(name)} is not among the {len(SUPPORTED)} tested families; use one of docs/families.md"
        )
    if model_type != name and WRAPPERS.get(model_type) != name:
        raise InputError(f"{place}: {name} inside of {shown(model_type)} is not tested; known: {', '.join(sorted(WRAPPERS))}")
    family = SUPPORTED[name]
    for setting, reason in family.refused_settings.items():
        if text_config(config).get(setting):
            raise InputError(
                f"{place}: {name} with {setting} {text_config(config)[setting]!r} is not supported: {reason}; "
                "use a checkpoint without it"
            )
    return family


def number_in(config: Mapping[str, Any], name: str, place: str, least: int = 1, most: int | None = None) -> int | None:
    """A whole number from a config; None if it is absent or null.

    A list of equal numbers, as some families have with one entry per layer, counts as the number. Raises InputError for any
    other value, and for a number below `least` or above `most`.
    """
    value = config.get(name)
    if value is None:
        return None
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, int) or isinstance(entry, bool) or entry < least or (most is not None and entry > most):
            bound = f"at least {least}" if most is None else f"{least} to {most:,}"
            raise InputError(f"{place}: {name} is {shown(repr(value))}; a whole number, {bound}, is needed: restore the config")
    if len(set(entries)) != 1:
        odd = next((i for i, entry in enumerate(entries) if entry != entries[0]), 0)
        which = f"entry {odd} is not entry 0" if entries else "it has no entry"
        raise InputError(
            f"{place}: {name} is {shown(repr(value))}: {which}; layers that differ in it are not supported, so use a "
            f"checkpoint whose layers all have the same"
        )
    return int(entries[0])


def expert_count_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of the raw language-model config that hold the number of routed experts."""
    text = text_config(config)
    return tuple(name for name in EXPERT_COUNT_FIELDS if text.get(name) is not None)


def num_experts_in(config: Mapping[str, Any], place: str) -> int:
    """The number of routed experts. Raises InputError for a model without experts, or with two different counts."""
    text = text_config(config)
    counts = {name: number_in(text, name, place, least=0) or 0 for name in expert_count_fields(config)}
    if not counts or max(counts.values()) < 2:
        raise InputError(
            f"{place}: {config.get('model_type')!r} is not a Mixture-of-Experts model: its config has no expert count "
            f"(looked for {', '.join(EXPERT_COUNT_FIELDS)}); there are no experts to merge: use one that has them"
        )
    if len(set(counts.values())) > 1:
        raise InputError(f"{place}: the config disagrees with itself about the number of experts: {counts}; restore the config")
    return next(iter(counts.values()))


def top_k_in(config: Mapping[str, Any], place: str) -> int:
    """Number of experts that the router picks for a token.
    Raises InputError when the config does not state it, or it is too large."""
    text = text_config(config)
    for name in TOP_K_FIELDS:
        top_k = number_in(text, name, place, most=num_experts_in(config, place))
        if top_k is not None:
            return top_k
    raise InputError(
        f"{place}: the config does not say how many experts a token is sent to ({', '.join(TOP_K_FIELDS)}); restore the config"
    )


@dataclass(frozen=True)
class Groups:
    """Groups of a router: their number, how many of them a token may use, and the number of best scores that rank a group."""

    num_groups: int
    num_chosen: int
    num_scores: int


def groups_in(config: Mapping[str, Any], place: str) -> Groups | None:
    """The groups of a supported family's router, or None for a router without groups.

    Raises InputError if the experts do not divide equally into groups, or if a token may use more groups than exist.
    """
    text = text_config(config)
    num_scores = SUPPORTED[family_name(config)].group_scores
    if num_scores == 0 or text.get("topk_method") == "greedy":
        return None
    named = ((name, number_in(text, name, place)) for name in GROUP_COUNT_FIELDS)
    name, num_groups = next(((name, number) for name, number in named if number is not None), ("", 1))
    if num_groups <= 1:
        return None
    num_experts, top_k = num_experts_in(config, place), top_k_in(config, place)
    if num_experts % num_groups or num_experts // num_groups < num_scores:
        raise InputError(
            f"{place}: {name} is {num_groups}; {num_experts} experts must divide into that many equal groups of at least "
            f"{num_scores}: restore the config"
        )
    num_chosen = number_in(text, CHOSEN_GROUPS_FIELD, place, most=num_groups) or num_groups
    if num_chosen * (num_experts // num_groups) < top_k:
        raise InputError(
            f"{place}: {CHOSEN_GROUPS_FIELD} is {num_chosen}; so many groups hold {num_chosen * (num_experts // num_groups)} "
            f"experts, and a token is sent to {top_k}: restore the config"
        )
    return Groups(num_groups, num_chosen, num_scores)


def stock_targets(config: Mapping[str, Any], place: str) -> list[int]:
    """Every number of experts r possible in a stock export: at least top-k, and equally many in every group."""
    num_experts, top_k = num_experts_in(config, place), top_k_in(config, place)
    groups = groups_in(config, place)
    if groups is None:
        return list(range(top_k, num_experts + 1))
    sizes = range(groups.num_scores, num_experts // groups.num_groups + 1)
    return [groups.num_groups * size for size in sizes if groups.num_chosen * size >= top_k]


def mtp_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of the raw language-model config that state a nonzero number of layers that predict further tokens."""
    text = text_config(config)
    return tuple(name for name in MTP_FIELDS if isinstance(text.get(name), int) and text[name] > 0)
