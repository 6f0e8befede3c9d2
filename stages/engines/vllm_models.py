"""Tied exports as vLLM runs them: vLLM's own class of the source, with fewer experts and a map from router rows to them.

While vLLM's class builds its layers, each layer's experts are made with the number that the export keeps in that layer, and
with a router that chooses among all E rows as vLLM itself would, and then looks the choice up in `expert_map` [E]. Checkpoints
hold that map, which `load_weights` copies. Written for vLLM 0.32 (docs/engines.md).
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

from stages.engines.vllm_plugin import TIED_CLASSES
from stages.model.tied import CONFIG_KEY

_FACTORY = "FusedMoEFactory"
_MAP_NAME = "expert_map"
_GROUPED = {"use_grouped_topk": False, "num_expert_group": None, "topk_group": None, "e_score_correction_bias": None}
"""Settings of routing that experts must not see: the router alone reads them, and they are about E experts."""


class MappedRouter(BaseRouter):  # type: ignore[misc]  # vLLM is not where mypy runs
    """Chooses as vLLM's router for E experts does, and maps each choice to a kept expert.

    source: that router. expert_map: int64 [E].
    """

    def __init__(self, source: BaseRouter, num_kept: int, expert_map: Tensor) -> None:
        super().__init__(top_k=source.top_k, global_num_experts=num_kept)
        self.source = source
        self.expert_map = expert_map

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """One that no kernel computes by itself: it would leave the map out."""
        return RoutingMethodType.Custom

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, *, input_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights, ids = self.source._compute_routing(hidden_states, router_logits, indices_type, input_ids=input_ids)
        return weights, self.expert_map[ids.long()].to(ids.dtype)


def _mapped_factory(make: Callable[..., nn.Module], num_kept: Mapping[int, int]) -> Callable[..., nn.Module]:
    """vLLM's function that makes the experts of a layer, for layers with fewer of them. num_kept: by layer."""

    def make_mapped(**settings: Any) -> nn.Module:
        if settings.get("enable_eplb") or settings.get("num_redundant_experts"):
            raise ValueError("hcsmoe: a tied export has no redundant experts; start vLLM without enable_eplb")
        if settings.get("fuse_shared_experts"):
            raise ValueError("hcsmoe: experts of a tied export cannot be fused with shared ones; turn that fusion off")
        layer = int(settings["prefix"].split("layers.")[1].split(".")[0])
        is_scaled_later = settings.get("apply_routed_scale_to_output", False)
        expert_map = torch.zeros(settings["num_experts"], dtype=torch.int64)
        source = create_fused_moe_router(
            top_k=settings["top_k"],
            global_num_experts=settings["num_experts"],
            renormalize=settings.get("renormalize", True),
            use_grouped_topk=settings.get("use_grouped_topk", False),
            num_expert_group=settings.get("num_expert_group"),
            topk_group=settings.get("topk_group"),
            scoring_func=settings.get("scoring_func", "softmax"),
            routed_scaling_factor=1.0 if is_scaled_later else settings.get("routed_scaling_factor", 1.0),
            e_score_correction_bias=settings.get("e_score_correction_bias"),
            custom_routing_function=settings.get("custom_routing_function"),
        )
        router = MappedRouter(source, num_kept[layer], expert_map)
        plain = {name: _GROUPED.get(name, value) for name, value in settings.items()}
        experts = make(**{**plain, "num_experts": num_kept[layer], "router": router})
        experts.register_buffer(f"merged_{_MAP_NAME}", expert_map, persistent=False)
        return experts

    return make_mapped


@contextmanager
def _mapped_experts(module: str, num_kept: Mapping[int, int]) -> Iterator[None]:
    """While this lasts, a module of vLLM makes experts by `_mapped_factory`."""
    owner = sys.modules[module]
    make = getattr(owner, _FACTORY, None)
    if make is None:
        raise RuntimeError(f"hcsmoe: {module} of this version of vLLM has no {_FACTORY}; use vLLM 0.32 (docs/engines.md)")
    setattr(owner, _FACTORY, _mapped_factory(make, num_kept))
    try:
        yield
    finally:
        setattr(owner, _FACTORY, make)


def _layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


class _Tied:
    """What a tied class adds to vLLM's own, its base."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config.get_text_config()
        num_kept = {int(layer): count for layer, count in getattr(config, CONFIG_KEY).items()}
        with _mapped_experts(type(self).__mro__[2].__module__, num_kept):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]  # of the base
        self._routers = {}
        for name, module in self.named_modules():  # type: ignore[attr-defined]  # of the base, a torch module
            router = getattr(module, "router", None)
            if isinstance(router, MappedRouter):
                if module.is_monolithic:
                    raise ValueError(
                        f"{name}: {module.routed_experts.quant_method.method_name} routes by itself and would leave the map "
                        "of this tied export out; choose another backend (--moe-backend), or make a stock export"
                    )
                self._routers[_layer_of(name)] = router

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the maps, and let the base load everything else. Raises ValueError unless each layer with experts has a map."""
        missing = set(self._routers)

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                if not name.endswith(f".experts.{_MAP_NAME}"):
                    yield name, tensor
                    continue
                layer = _layer_of(name)
                self._routers[layer].expert_map.copy_(tensor)
                missing.discard(layer)

        loaded: set[str] = super().load_weights(others())  # type: ignore[misc]  # of the base
        if missing:
            raise ValueError(f"hcsmoe: the checkpoint has no {_MAP_NAME} for layers {sorted(missing)}; export it again")
        return loaded


@cache
def __getattr__(name: str) -> type:
    """The class that runs a tied export, for vLLM, which asks this module by name. Only its own base is imported."""
    if name not in TIED_CLASSES:
        raise AttributeError(name)
    module, _, base = TIED_CLASSES[name].partition(":")
    return type(name, (_Tied, getattr(import_module(module), base)), {"__module__": __name__})
