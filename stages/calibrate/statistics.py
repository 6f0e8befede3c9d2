"""Sums over tokens for every expert of one MoE layer, taken while the layer runs.

Dimensions: T tokens, C tokens of a chunk, D hidden size, F intermediate size, P what the first product gives an expert (2 F
with a gate, else F), E experts, G experts of a group, k experts a token, R = T k routed pairs of a token and an expert.

One pass serves both purposes: a_e = act(W_gate x) * W_up x is computed for every expert on every token; W_down meets the
routed tokens (for the layer's output) and the sum of a_e (for the mean output), since
sum_t W_down a_t = W_down sum_t a_t. Features and notation follow HC-SMoE (arXiv:2410.08589, section 3).

Activations are made for a chunk of tokens and a group of experts at a time, so that what is done with them element by element
stays in the processor's cache; of those only the routed rows are kept, for one product with W_down an expert.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.common.tables import PartialStatistics

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
}


@dataclass(frozen=True)
class ExpertsLayout:
    """How an experts module keeps its weights: transformers' own flags where the module declares them."""

    is_transposed: bool
    has_bias: bool
    has_gate: bool

    @classmethod
    def of(cls, experts: Any) -> "ExpertsLayout":
        """Read the flags; Llama 4's module has none, and multiplies from the right."""
        if hasattr(experts, "is_transposed"):
            return cls(experts.is_transposed, experts.has_bias, experts.has_gate)
        return cls(is_transposed=True, has_bias=False, has_gate=True)


_CHUNK_BYTES = {"cpu": 1 << 21}
"""Bytes of first products at a time, by kind of device: what a core's cache takes. A fixed number, since bits depend on it."""
_CHUNK_BYTES_ELSEWHERE = 1 << 28
_LEAST_CHUNK = 256
_GROUP_COLUMNS = 2048
"""A product has about this many columns: small experts are multiplied together, since every call has its price."""


@dataclass(frozen=True)
class Blocks:
    """How the work of a layer is cut, to tokens of a chunk and experts of a group: by shapes and kind of device alone."""

    num_tokens: int
    num_experts: int

    @classmethod
    def of(cls, weight: Tensor, layout: ExpertsLayout) -> "Blocks":
        """weight: of the first product, [E, P, D], or [E, D, P] transposed, whose experts are no single matrix."""
        columns = weight.shape[2] if layout.is_transposed else weight.shape[1]
        group = 1 if layout.is_transposed else min(weight.shape[0], max(1, _GROUP_COLUMNS // columns))
        most = _CHUNK_BYTES.get(weight.device.type, _CHUNK_BYTES_ELSEWHERE) // (group * columns * weight.element_size())
        return cls(max(_LEAST_CHUNK, 1 << max(most, 1).bit_length() - 1), group)


class Routing:
    """The routed pairs of a micro-batch, sorted by expert, then by token.

    slots_R: place of each in the flattened [T, k]. tokens_R: its token. rank_R: where the pair of each place stands.
    Expert e's pairs that lie in chunk c stand at [begin(e, c), begin(e, c + 1)).
    """

    def __init__(self, index_Tk: Tensor, num_experts: int, chunk: int) -> None:
        num_tokens, top_k = index_Tk.shape
        experts_R = index_Tk.flatten()
        self.slots_R = experts_R.argsort(stable=True)
        self.rank_R = self.slots_R.argsort()
        self.tokens_R = self.slots_R // top_k
        self.num_chunks = -(-num_tokens // chunk)
        buckets_R = experts_R[self.slots_R] * self.num_chunks + self.tokens_R // chunk
        ends = torch.bincount(buckets_R, minlength=num_experts * self.num_chunks).cumsum(0)
        self._begins: list[int] = [0, *ends.tolist()]

    def begin(self, expert: int, chunk: int = 0) -> int:
        """Where the pairs of an expert from a chunk on begin; the next expert's first is this one's end."""
        return self._begins[expert * self.num_chunks + chunk]


class LayerStatistics:
    """Watches one MoE layer's router and experts and adds up; the layer's output stays what it was, up to rounding.

    experts: the module with the fused weights and transformers' layout flags (`is_transposed`, `has_bias`, `has_gate`).
    router: the module that returns the router logits [T, E] first.
    score: how the family turns logits to probabilities, a key of SCORES.
    """

    def __init__(self, layer: int, experts: Any, router: nn.Module, score: str) -> None:
        self.layer, self.experts, self.router = layer, experts, router
        self.score = SCORES[score]
        self.layout = ExpertsLayout.of(experts)
        num_experts, device = experts.num_experts, experts.down_proj.device
        intermediate = experts.down_proj.shape[1] if self.layout.is_transposed else experts.down_proj.shape[2]
        self._first = "gate_up_proj" if self.layout.has_gate else "up_proj"
        self.blocks = Blocks.of(getattr(experts, self._first), self.layout)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.num_tokens = 0
        self.num_routed_E = zeros(num_experts)
        self.gate_sum_E = zeros(num_experts)
        self.activation_sum_EF = zeros(num_experts, intermediate)
        self.gated_output_norm_sum_E = zeros(num_experts)
        self.router_probability_sum_E = zeros(num_experts)
        self.router_logit_gram_EE = zeros(num_experts, num_experts)
        self._hook: RemovableHandle | None = None
        self._forward: Callable[..., Tensor] = self._forward_routed

    def __enter__(self) -> Self:
        self.experts.forward = self._forward
        self._hook = self.router.register_forward_hook(self._watch_router)
        return self

    def __exit__(self, *_: object) -> None:
        del self.experts.forward
        assert self._hook is not None
        self._hook.remove()

    def _watch_router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._add_logits(output[0] if isinstance(output, tuple) else output)

    def _add_logits(self, logits: Tensor) -> None:
        logits_TE = logits.reshape(-1, self.experts.num_experts).float()
        self.router_probability_sum_E += self.score(logits_TE).double().sum(0)
        self.router_logit_gram_EE += logits_TE.double().T @ logits_TE.double()

    def _product(self, x: Tensor, name: str, first: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Rows times the weights of experts [first, stop), biases added: [rows, (stop - first) P or D]."""
        weight = getattr(self.experts, name)[first:stop]
        product = torch.mm(x, weight[0] if self.layout.is_transposed else weight.flatten(0, 1).T, out=out)
        return product.add_(getattr(self.experts, f"{name}_bias")[first:stop].flatten()) if self.layout.has_bias else product

    def _activate(self, products: Tensor) -> Tensor:
        """[..., P] to [..., F], by the module's own gate: families differ in it."""
        return self._apply_gate(products) if self.layout.has_gate else self.experts.act_fn(products)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.experts._apply_gate(gate_up)  # type: ignore[no-any-return]

    def _groups(self) -> Iterator[tuple[int, int]]:
        for first in range(0, self.experts.num_experts, self.blocks.num_experts):
            yield first, min(first + self.blocks.num_experts, self.experts.num_experts)

    def _activations(self, hidden_TD: Tensor, first: int, stop: int) -> Iterator[Tensor]:
        """Activations [C, G, F] of experts [first, stop), chunk by chunk over all tokens; each adds to the sums."""
        products = hidden_TD.new_empty(0)
        for hidden_CD in hidden_TD.split(self.blocks.num_tokens):
            if len(products) != len(hidden_CD):
                products = products.resize_(0)
            products = self._product(hidden_CD, self._first, first, stop, products)
            a_CGF = self._activate(products.view(len(hidden_CD), stop - first, -1))
            self._add_unrouted(first, stop, a_CGF)
            yield a_CGF

    def _sum_unrouted(self, hidden_TD: Tensor) -> None:
        """Add the activations of every expert on all tokens to the sums."""
        for first, stop in self._groups():
            for _ in self._activations(hidden_TD, first, stop):
                pass

    def _add_unrouted(self, first: int, stop: int, a_CGF: Tensor) -> None:
        """Add a chunk's activations to the sums that run over all tokens: float32 inside of a chunk, float64 across."""
        self.activation_sum_EF[first:stop] += a_CGF.sum(0, dtype=torch.float32)

    def _forward_routed(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        """The experts' forward, [T, D]; routing is what the model passes.

        Gated outputs are rounded and summed over k as transformers' own `grouped_mm` does, so that later layers see what
        they see in the model.
        """
        self.num_tokens += len(hidden_TD)
        routing = Routing(top_k_index_Tk, self.experts.num_experts, self.blocks.num_tokens)
        gates_R = top_k_weights_Tk.flatten()[routing.slots_R]
        norms_R = torch.zeros(len(gates_R), device=hidden_TD.device)
        dtype = torch.promote_types(hidden_TD.dtype, gates_R.dtype)
        gated_RD = torch.zeros((len(gates_R), hidden_TD.shape[1]), dtype=dtype, device=hidden_TD.device)
        for first, stop in self._groups():
            begin = routing.begin(first)
            rows_RF = self._routed_activations(hidden_TD, routing, first, stop)
            for expert in range(first, stop):
                low, high = routing.begin(expert), routing.begin(expert + 1)
                if low < high:
                    output = self._product(rows_RF[low - begin : high - begin], "down_proj", expert, expert + 1)
                    torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32, out=norms_R[low:high])
                    torch.mul(output, gates_R[low:high, None], out=gated_RD[low:high])
        bounds = [routing.begin(expert) for expert in range(self.experts.num_experts + 1)]
        self._add_routed(bounds, gates_R, gates_R.float() * norms_R)
        return gated_RD[routing.rank_R].view(*top_k_index_Tk.shape, -1).sum(1).to(hidden_TD.dtype)

    def _routed_activations(self, hidden_TD: Tensor, routing: Routing, first: int, stop: int) -> Tensor:
        """Activations [R', F] of the routed pairs of experts [first, stop), in their order; adds those of all tokens up."""
        begin, end = routing.begin(first), routing.begin(stop)
        rows_RF = hidden_TD.new_empty(end - begin, self.activation_sum_EF.shape[1])
        for chunk, a_CGF in enumerate(self._activations(hidden_TD, first, stop)):
            for expert in range(first, stop):
                low, high = routing.begin(expert, chunk), routing.begin(expert, chunk + 1)
                tokens = routing.tokens_R[low:high] - chunk * self.blocks.num_tokens
                torch.index_select(a_CGF[:, expert - first], 0, tokens, out=rows_RF[low - begin : high - begin])
        return rows_RF

    def _add_routed(self, bounds: list[int], gates_R: Tensor, gated_norms_R: Tensor) -> None:
        """Add what runs over routed tokens only. bounds: where each expert's pairs begin, and the end."""
        sizes = [stop - start for start, stop in pairwise(bounds)]
        self.num_routed_E += torch.tensor(sizes, device=gates_R.device)
        for total_E, values_R in ((self.gate_sum_E, gates_R), (self.gated_output_norm_sum_E, gated_norms_R)):
            parts = values_R[: bounds[-1]].double().split(sizes)
            total_E += torch.stack([part.sum() for part in parts])

    def result(self) -> PartialStatistics:
        """The sums so far."""
        return PartialStatistics(
            layer=self.layer,
            num_tokens=self.num_tokens,
            num_sampled_G=np.array([self.num_tokens]),
            num_routed_E=self.num_routed_E.long().cpu().numpy(),
            gate_sum_E=self.gate_sum_E.cpu().numpy(),
            activation_sum_EGF=self.activation_sum_EF[:, None].cpu().numpy(),
            gated_output_norm_sum_E=self.gated_output_norm_sum_E.cpu().numpy(),
            router_probability_sum_E=self.router_probability_sum_E.cpu().numpy(),
            router_logit_gram_EE=self.router_logit_gram_EE.cpu().numpy(),
        )


class InputGatedStatistics(LayerStatistics):
    """The same for Llama 4, whose gate multiplies the expert's input.

    Its experts get one block of rows for each expert, [E T, D], gate times x, and zeros where a token is not routed. The mean
    output is still that of x itself; gate-weighted norms are those of what the expert adds, ||E_e(gate x)||.
    """

    def __init__(self, layer: int, experts: Any, router: nn.Module, score: str) -> None:
        super().__init__(layer, experts, router, score)
        self._forward = self._forward_blocks

    def _watch_router(self, _module: nn.Module, args: Any, output: Any) -> None:
        self._hidden_TD: Tensor = args[0]
        self._scores_TE, logits_TE = output
        self._add_logits(logits_TE)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.experts.act_fn(gate)  # type: ignore[no-any-return]

    def _forward_blocks(self, gated_rows: Tensor) -> Tensor:
        gated_ETD = gated_rows.view(self.experts.num_experts, -1, gated_rows.shape[-1])
        out_ETD = torch.zeros_like(gated_ETD)
        self._sum_unrouted(self._hidden_TD)
        self.num_tokens += gated_ETD.shape[1]
        bounds, gates, norms = [0], [], []
        for expert in range(self.experts.num_experts):
            (tokens,) = torch.where(self._scores_TE[:, expert] > 0)
            bounds.append(bounds[-1] + len(tokens))
            products = self._product(gated_ETD[expert, tokens], self._first, expert, expert + 1)
            output = self._product(self._activate(products), "down_proj", expert, expert + 1)
            out_ETD[expert, tokens] = output
            gates.append(self._scores_TE[tokens, expert])
            norms.append(torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32))
        self._add_routed(bounds, torch.cat(gates), torch.cat(norms))
        return out_ETD.view(gated_rows.shape)
