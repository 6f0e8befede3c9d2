"""A decoder layer whose experts are those of a layer plan, in memory: transformers' own modules with fewer experts.

Dimensions: T tokens, D hidden size, k experts a token, E experts of the source, S slots.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from types import MappingProxyType

import torch
from torch import Tensor, nn

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.weighted_sum import combined, merge_rows, pooled
from stages.contracts.errors import InputError
from stages.contracts.layer_plan import LayerPlan, Slot, neuron_places, pooled_places
from stages.model.adapter import build_meta_model, expert_axes
from stages.model.expert_weights import ExpertWeights
from stages.model.experts_forward import ExpertsForward
from stages.model.layer_shard import LayerShard
from stages.model.packed import PackedStack
from stages.model.roles import Neurons, neuron_axes
from stages.model.stream import replaced_forward
from stages.recombine.router import Router
from stages.recombine.shared import SharedExpert, is_one_tensor

Seen = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Given the input [T, D] of the experts, slots [T, k] and their gates [T, k], what takes the place of their output [T, D]."""


@lru_cache(maxsize=1)
def _axes(model: str) -> Mapping[str, int]:
    return expert_axes(Checkpoint(model))


class Student:
    """A MoE layer of a loaded layer shard with the experts of a plan.

    Attributes: `weights` and `forward` of the slots; `down_name`, the parameter that holds W_down of all of them; `shared`, the
    shared expert whose W_down can be replaced, if there is one, and `shared_name`, the parameter that holds it.
    replaced: values of further parameters, by name. like: a student of the same slots, whose experts are used again.
    """

    weights: ExpertWeights

    def __init__(
        self, shard: LayerShard, layer: int, plan: LayerPlan, replaced: Mapping[str, Tensor] = MappingProxyType({}),
        like: "Student | None" = None,
    ) -> None:  # fmt: skip
        self._shard, self._layer = shard, layer
        adapted = shard.adapted
        prefix = f"{adapted.layers_prefix}{layer}."
        source = adapted.layers[layer]
        small = build_meta_model(adapted.checkpoint, num_experts=len(plan.slots)).get_submodule(prefix.rstrip("."))
        source_experts = adapted.experts_modules()[layer]
        inside = next(name for name, module in source.named_modules() if module is source_experts)
        self._block = inside.rpartition(".")[0]
        experts = small.get_submodule(inside)
        axes = _axes(str(adapted.checkpoint.folder))
        is_stock = plan.slots[0].row is not None
        neurons, place = neuron_axes(adapted), f"layer {layer}"
        for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
            axis = axes.get(prefix + name)
            if name.startswith(f"{inside}."):
                assert axis == 0, f"{name}: the experts are along the first axis in transformers' modules"
                held = shard.packed.get(prefix + name, tensor)
                slots = (_slot(held, slot, neurons.get(prefix + name), place) for slot in plan.slots)
                own = torch.stack([*slots]) if like is None else _get(like.weights.experts, name.removeprefix(f"{inside}."))
                _put(small, name, own)
            elif axis is not None and is_stock:
                rows = [slot.row.parts for slot in plan.slots if slot.row is not None]
                _put(small, name, merge_rows(tensor, axis, rows, place))
            else:
                _put(small, name, tensor)
        self._module = small if is_stock else source
        self._replaced = experts if is_stock else source_experts
        shared = SharedExpert.of(self._module, self._replaced)
        self.shared = shared if shared is not None and is_one_tensor(shard, prefix + shared.name) else None
        for name, value in replaced.items():
            if self.shared is not None and name == prefix + self.shared.name:
                self.shared.down_DF = value.to(shard.device)
                continue
            own = _get(small, name.removeprefix(prefix))
            _put(small, name.removeprefix(prefix), value.to(own.dtype).to(shard.device))
        self._slot_E = None if is_stock else torch.from_numpy(plan.slot_E).long().to(shard.device)
        self.down_name = f"{prefix}{inside}.down_proj"
        self.shared_name = f"{prefix}{self.shared.name}" if self.shared is not None else ""
        self.weights = ExpertWeights(experts)
        self.forward = ExpertsForward(self.weights)
        self._routers = [name for name, axis in _router_names(axes, prefix, inside) if axis == 0] if is_stock else []

    def routers(self) -> tuple[Router, Router, nn.Module] | None:
        """The router's linear part in the source and here, with the module here; None for one that is not one matrix."""
        prefix = f"{self._shard.adapted.layers_prefix}{self._layer}."
        source = self._shard.adapted.layers[self._layer]
        matrices = [name for name in self._routers if _get(source, name).ndim == 2]
        if len(matrices) != 1:
            return None
        owner = matrices[0].rpartition(".")[0]
        names = [matrices[0], *(name for name in self._routers if name == f"{owner}.bias")]
        both = []
        for module in (source, self._module):
            weight, *bias = (_get(module, name) for name in names)
            both.append(Router(tuple(prefix + name for name in names), weight, bias[0] if bias else None))
        return both[0], both[1], self._module.get_submodule(owner)

    def source_routing(self, x_ND: Tensor) -> Tensor:
        """Gates [N, E], float32, that the source's router gives on some inputs of the layer's experts; 0 where an expert is not
        picked."""
        adapted = self._shard.adapted
        num_experts = self._shard.expert_weights(self._layer).num_experts
        gate_NE = torch.zeros(len(x_ND), num_experts, device=x_ND.device)

        def see(hidden_ND: Tensor, index_Nk: Tensor, gates_Nk: Tensor) -> Tensor:
            gate_NE.scatter_add_(1, index_Nk, gates_Nk.float())
            return torch.zeros_like(hidden_ND)

        with replaced_forward(adapted.experts_modules()[self._layer], see):
            adapted.layers[self._layer].get_submodule(self._block)(x_ND[None])
        return gate_NE

    def route(self, x_TD: Tensor, see: Seen) -> None:
        """Send some inputs of the layer's experts through the router, with `see` in the place of the experts."""
        with self._stands_in(see):
            self._module.get_submodule(self._block)(x_TD[None])

    @contextmanager
    def watched_router(self, x: list[Tensor], logits: list[Tensor]) -> Iterator[None]:
        """Append the inputs [T, D] and logits [T, S] of a stock layer's router, where `routers` finds it."""
        routers = self.routers()
        if routers is None:
            yield
            return

        def see(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            found = output[0] if isinstance(output, tuple) else output
            x.append(given[0].reshape(-1, given[0].shape[-1]))
            logits.append(found.reshape(-1, found.shape[-1]))

        handle = routers[2].register_forward_hook(see)
        try:
            yield
        finally:
            handle.remove()

    def run(self, hidden_BTD: Tensor, see: Seen) -> Tensor:
        """Hidden states [B, T, D] after the layer, with `see` in the place of its experts."""
        with self._stands_in(see):
            return self._shard.run_layer(self._layer, hidden_BTD, self._module)

    @contextmanager
    def _stands_in(self, see: Seen) -> Iterator[None]:
        def forward(hidden_TD: Tensor, index_Tk: Tensor, gates_Tk: Tensor) -> Tensor:
            return see(hidden_TD, index_Tk if self._slot_E is None else self._slot_E[index_Tk], gates_Tk)

        with replaced_forward(self._replaced, forward), self.shared.stands_in() if self.shared is not None else nullcontext():
            yield

    def outputs(self, hidden_TD: Tensor, slots_Tk: Tensor, gates_Tk: Tensor) -> Tensor:
        """What the slots give: to be passed to `run` for the layer as it is."""
        return self.forward.output_gated(hidden_TD, slots_Tk, gates_Tk, lambda pairs: None)

    def down(self, slot: int) -> Tensor:
        """W_down [D, F] of a slot."""
        weight = self.weights.experts.down_proj[slot]
        return weight.T if self.weights.layout.is_transposed else weight  # type: ignore[no-any-return]

    def stacked(self, weights: Sequence[Tensor]) -> Tensor:
        """W_down [D, F] of all slots, in the shape of the parameter `down_name`."""
        return torch.stack([weight.T if self.weights.layout.is_transposed else weight for weight in weights])

    def set_down(self, stacked: Tensor) -> None:
        """Give all slots another W_down, as `stacked` makes it, rounded to the dtype of the model."""
        self.weights.experts.down_proj.copy_(stacked)


def _slot(experts: Tensor | PackedStack, slot: Slot, neurons: Neurons | None, place: str) -> Tensor:
    """A slot's part of a parameter of the experts, which are along its first axis. neurons: where they lie in one's part."""
    is_whole = not slot.is_joined and all(member.neurons is None and member.places is None for member in slot.members)
    if neurons is None or is_whole:
        return combined([(experts[member.expert], member.weight) for member in slot.members], experts.dtype, place)
    axis, size = neurons.axis, experts.shape[neurons.axis + 1]
    order = neurons.order if size == 2 * neurons.number else "single"
    if slot.members[0].places is not None:
        placed = [(torch.from_numpy(places), torch.from_numpy(shares)) for places, shares in pooled_places(slot, size, order)]
        members = ((experts[member.expert], *some) for member, some in zip(slot.members, placed, strict=True))
        return pooled(members, axis, experts.dtype, place)
    chosen = [
        [
            experts[member.expert].index_select(axis, torch.from_numpy(places).to(experts.device))
            for places in neuron_places(member.neurons, size, order)
        ]
        for member in slot.members
    ]
    if slot.is_joined:
        return torch.cat([parts[half] for half in range(len(chosen[0])) for parts in chosen], dim=axis)
    whole = [torch.cat(parts, dim=axis) for parts in chosen]
    return combined([(part, member.weight) for part, member in zip(whole, slot.members, strict=True)], experts.dtype, place)


def _router_names(axes: Mapping[str, int], prefix: str, inside: str) -> Iterator[tuple[str, int]]:
    """Parameters of a layer, outside of its experts, that have an axis of experts; and that axis."""
    for name, axis in axes.items():
        if name.startswith(prefix) and not name.startswith(f"{prefix}{inside}."):
            yield name.removeprefix(prefix), axis


def _get(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of a module by its name."""
    owner_name, _, own = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner_name), own)
    return value


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer of a module by its name."""
    owner_name, _, own = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if own in owner._parameters:
        owner._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[own] = tensor


def output_scale(layer: Callable[[Tensor], Tensor], bare_TD: Tensor, x_TD: Tensor, place: str) -> float:
    """The factor with which a layer adds what its experts give to its own output. Raises InputError where it does otherwise.

    layer: gives the layer's output [T, D] where its experts give this. bare_TD: its output where they give nothing. x_TD: what
    they are given.

    The experts' own output may be so much smaller than the stream that little but rounding would be seen of it. So they give
    their input instead, of every second token as large as the layer's output, of the others half as large.
    """
    size_T1 = bare_TD.float().norm(dim=1, keepdim=True) / x_TD.float().norm(dim=1, keepdim=True).clamp(min=1e-30)
    size_T1[1::2] /= 2
    given_TD = (x_TD.float() * size_T1).to(x_TD.dtype)
    added, given = (layer(given_TD).float() - bare_TD.float()).double(), given_TD.double()
    scale = float((added * given).sum() / given.square().sum())
    left = float((added - scale * given).norm() / added.norm().clamp(min=1e-30))
    if not left < 0.05:
        raise InputError(
            f"{place}: the layer does not simply add its experts' outputs ({left:.0%} of the change is something else), so "
            "they cannot be refitted; leave refit out"
        )
    return scale
