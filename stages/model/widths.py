"""The config of a checkpoint whose experts have fewer neurons, and what else the config's width sizes. No torch."""

from collections.abc import Mapping
from typing import Any

from stages.contracts.errors import InputError
from stages.contracts.widths import ExpertSizes
from stages.model.families import family_name, num_experts_in, number_in, text_config

WIDTH_FIELDS = ("moe_intermediate_size", "intermediate_size")
"""Config names of the number of neurons of a routed expert: the first that a config has."""
SHARED_COUNT_FIELDS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
"""Config names of a number of shared experts. They are one dense block of that number times the width."""
SIZES_SHARED = frozenset(
    {
        "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32",
        "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "hy_v3", "kimi_linear", "solar_open",
    }
)  # fmt: skip
"""Families whose config has one width for routed and shared experts, and a number of shared ones."""
SIZES_MORE = {
    "hunyuan_v1_moe": "its shared expert, whose size has no number beside it",
    "jamba": "its dense layers",
    "llama4_text": "its shared expert, whose size has no number beside it",
}
"""Families whose config has one width for routed experts and something that no other setting can keep as it is."""


def num_neurons_in(config: Mapping[str, Any], place: str) -> int:
    """Neurons of a routed expert. Raises InputError for a config that does not state them."""
    return number_in(text_config(config), _width_field(config, place), place) or 0


def expert_sizes(config: Mapping[str, Any], place: str) -> ExpertSizes | None:
    """Sizes that a config states; None where it leaves the neurons to transformers' default."""
    if _stated_width_field(config) is None:
        return None
    return ExpertSizes(num_experts_in(config, place), num_neurons_in(config, place))


def narrowed(config: Mapping[str, Any], num_neurons: int, place: str) -> dict[str, Any]:
    """Settings of the language model's raw config that change if routed experts have num_neurons: its width; and the number of
    shared experts, where that keeps them as they are.

    Raises InputError where the width also sizes something that cannot be kept.
    """
    text, name, field = text_config(config), family_name(config), _width_field(config, place)
    if name in SIZES_MORE:
        raise InputError(
            f"{place}: {field} of {name} also sizes {SIZES_MORE[name]}, so its experts cannot be narrower; keep fewer experts "
            f"instead, by clustering.num_experts"
        )
    changes: dict[str, Any] = {field: _like(text[field], num_neurons)}
    counted = [(one, number_in(text, one, place, least=0)) for one in SHARED_COUNT_FIELDS if name in SIZES_SHARED]
    for count_field, count in ((one, count) for one, count in counted if count):
        size = count * num_neurons_in(config, place)
        if size % num_neurons:
            raise InputError(
                f"{place}: {field} of {name} also sizes its shared experts ({count} x {size // count} neurons), and {size} is "
                f"no multiple of {num_neurons}; choose a width whose neurons divide it, such as half, or keep fewer experts"
            )
        changes[count_field] = _like(text[count_field], size // num_neurons)
    return changes


def _width_field(config: Mapping[str, Any], place: str) -> str:
    found = _stated_width_field(config)
    if found is None:
        raise InputError(
            f"{place}: config.json has none of {', '.join(WIDTH_FIELDS)}, so its experts cannot be narrower; restore the config"
        )
    return found


def _stated_width_field(config: Mapping[str, Any]) -> str | None:
    text = text_config(config)
    return next((name for name in WIDTH_FIELDS if text.get(name) is not None), None)


def _like(value: Any, number: int) -> Any:
    """A number, or a list of it where the config has one entry per layer."""
    return [number] * len(value) if isinstance(value, list) else number
