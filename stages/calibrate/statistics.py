"""Sums over tokens for every expert of one MoE layer, taken while the layer runs.

Dimensions: T tokens, C tokens of a chunk, D hidden size, F intermediate size, P what the first product gives an expert (2 F
with a gate, else F), E experts, G experts of a group, k experts a token, R = T k routed pairs of a token and an expert.

One pass serves both purposes: a_e = act(W_gate x) * W_up x is computed for every expert on every token; W_down meets the
routed tokens (for the layer's output) and the sum of a_e (for the mean output), since
sum_t W_down a_t = W_down sum_t a_t. Features and notation follow HC-SMoE (arXiv:2410.08589, section 3).

Activations are made for a chunk of tokens and a group of experts at a time, so that what is done with them element by element
stays in the processor's cache; of those only the routed rows are kept, for one product with W_down an expert.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from stages.calibrate.partial import PartialStatistics
from stages.model.expert_weights import ExpertWeights
from stages.model.products import can_group, gates_by_halves, grouped_down, padded, room_for
from stages.model.routing import Routing

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
}

_CHUNK_BYTES = defaultdict(lambda: 1 << 28, cpu=1 << 21)
"""Bytes of first products at a time, by kind of device: what a core's cache takes. A fixed number, since bits depend on it."""
_LEAST_CHUNK = 512
_GROUP_COLUMNS = 2048
"""A product has about this many columns: small experts are multiplied together, since every call has its price."""
_SUMMED_TOKENS = defaultdict(lambda: 1 << 20, cpu=128)
"""Tokens whose float32 values are made at once to be added up, by kind of device: so that they, too, stay in the cache."""


def add_over_tokens(total_GF: Tensor, a_CGF: Tensor) -> None:
    """Add activations [C, G, F] to float64 sums: float32 inside of so many tokens as are added at once, float64 across."""
    for part in a_CGF.split(_SUMMED_TOKENS[a_CGF.device.type]):
        total_GF += part.sum(0, dtype=torch.float32)


@dataclass(frozen=True)
class Blocks:
    """How the work of a layer is cut, to tokens of a chunk and experts of a group: by shapes and kind of device alone."""

    num_tokens: int
    num_experts: int

    @classmethod
    def of(cls, weights: ExpertWeights) -> "Blocks":
        """Experts are taken together only where their matrices can be one."""
        columns, can_join = weights.num_columns(weights.layout.first), weights.can_join(weights.layout.first)
        group = min(weights.num_experts, max(1, _GROUP_COLUMNS // columns)) if can_join else 1
        most = _CHUNK_BYTES[weights.device.type] // (group * columns * weights.dtype.itemsize)
        return cls(max(_LEAST_CHUNK, 1 << max(most, 1).bit_length() - 1), group)


class LayerStatistics:
    """Watches one MoE layer's router and experts and adds up; the layer's output stays what it was, up to rounding.

    weights: of the experts; their module's forward is replaced meanwhile.
    router: the module that returns the router logits [T, E] first.
    score: how the family turns logits to probabilities, a key of SCORES.
    """

    def __init__(self, layer: int, weights: ExpertWeights, router: nn.Module, score: str) -> None:
        self.layer, self.weights, self.router = layer, weights, router
        self.experts = weights.experts
        self.score = SCORES[score]
        self.blocks = Blocks.of(weights)
        self._is_grouped = can_group(weights)
        self._halves_gate = gates_by_halves(self.experts)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=weights.device)

        num_experts = weights.num_experts
        self.num_tokens = 0
        self.num_routed_E = zeros(num_experts)
        self.gate_sum_E = zeros(num_experts)
        self.activation_sum_EF = zeros(num_experts, weights.intermediate)
        self.gated_output_norm_sum_E = zeros(num_experts)
        self.router_probability_sum_E = zeros(num_experts)
        self.router_logit_gram_EE = zeros(num_experts, num_experts)
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Self:
        self.experts.forward = self._forward()
        self._hook = self.router.register_forward_hook(self._watch_router)
        return self

    def __exit__(self, *_: object) -> None:
        del self.experts.forward
        assert self._hook is not None
        self._hook.remove()

    def _forward(self) -> Callable[..., Tensor]:
        """What stands in for the experts' forward."""
        return self._forward_routed

    def _watch_router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._add_logits(output[0] if isinstance(output, tuple) else output)

    def _add_logits(self, logits: Tensor) -> None:
        logits_TE = logits.reshape(-1, self.weights.num_experts).float()
        self.router_probability_sum_E += self.score(logits_TE).double().sum(0)
        self.router_logit_gram_EE += logits_TE.double().T @ logits_TE.double()

    def _product(self, x: Tensor, name: str, first: int, stop: int, out: Tensor) -> Tensor:
        """Fill `out` with rows times the matrices of experts [first, stop), biases added: [rows, (stop - first) P or D]."""
        for column, matrix in self.weights.matrices(name, first, stop):
            torch.mm(x, matrix, out=out[:, column : column + matrix.shape[1]])
        bias = self.weights.bias(name, first, stop)
        return out if bias is None else out.add_(bias)

    def _first_product(self, x: Tensor, first: int, stop: int, out: Tensor | None = None) -> Tensor:
        """[rows, (stop - first) P], in `out` if that is given; it may have more rows."""
        name = self.weights.layout.first
        if out is None:
            out = x.new_empty(len(x), (stop - first) * self.weights.num_columns(name))
        return self._product(x, name, first, stop, out[: len(x)])

    def _activate(self, products: Tensor) -> Tensor:
        """[..., P] to [..., F], by the module's own gate: families differ in it. Overwrites what it is given."""
        if not self.weights.layout.has_gate:
            return self.experts.act_fn(products)  # type: ignore[no-any-return]
        if self._halves_gate:  # as the module does it, in less memory
            gate, up = products.chunk(2, dim=-1)
            return self.experts.act_fn(gate).mul_(up)  # type: ignore[no-any-return]
        return self.experts._apply_gate(products)  # type: ignore[no-any-return]

    def _expert_activations(self, hidden_TD: Tensor, tokens_R: Tensor, expert: int) -> Tensor:
        """Activations of one expert on some tokens, [R, F]; below them, rows of padding (see `padded`)."""
        padding = padded(len(tokens_R), hidden_TD.device) - len(tokens_R)
        x = hidden_TD[functional.pad(tokens_R, (0, padding))]
        activations = self._activate(self._first_product(x, expert, expert + 1))
        self.weights.release(self.weights.layout.first, expert, expert + 1)
        return activations

    def _groups(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        for start in range(first, stop, self.blocks.num_experts):
            yield start, min(start + self.blocks.num_experts, stop)

    def _activations(self, hidden_TD: Tensor, first: int, stop: int) -> Iterator[Tensor]:
        """Activations [C, G, F] of a group of experts, [first, stop), chunk by chunk over all tokens; each adds to the sums."""
        chunks = hidden_TD.split(self.blocks.num_tokens)
        products = self._first_product(chunks[0], first, stop)
        for number, hidden_CD in enumerate(chunks):
            if number:
                products = self._first_product(hidden_CD, first, stop, products)
            a_CGF = self._activate(products.view(len(hidden_CD), stop - first, -1))
            self._add_unrouted(first, stop, a_CGF)
            yield a_CGF
        self.weights.release(self.weights.layout.first, first, stop)

    def _sum_unrouted(self, hidden_TD: Tensor) -> None:
        """Add the activations of every expert on all tokens to the sums."""
        for first, stop in self._groups(0, self.weights.num_experts):
            for _ in self._activations(hidden_TD, first, stop):
                pass

    def _add_unrouted(self, first: int, stop: int, a_CGF: Tensor) -> None:
        """Add a chunk's activations to the sums that run over all tokens."""
        add_over_tokens(self.activation_sum_EF[first:stop], a_CGF)

    def _forward_routed(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        """The experts' forward, [T, D]; routing is what the model passes.

        Gated outputs are rounded and summed over k as transformers' own `grouped_mm` does, so that later layers see what
        they see in the model.
        """
        num_experts = self.weights.num_experts
        self.num_tokens += len(hidden_TD)
        routing = Routing(top_k_index_Tk, num_experts, self.blocks.num_tokens)
        gates_R = top_k_weights_Tk.flatten()[routing.slots_R]
        norms_R = torch.zeros(len(gates_R), device=hidden_TD.device)
        dtype = torch.promote_types(hidden_TD.dtype, gates_R.dtype)
        gated_RD = torch.empty((len(gates_R), hidden_TD.shape[1]), dtype=dtype, device=hidden_TD.device)
        gated_RD[routing.begin(num_experts) :] = 0  # slots of no expert
        for first, stop in [(0, num_experts)] if self._is_grouped else self._groups(0, num_experts):
            low, high = routing.begin(first), routing.begin(stop)
            rows_RF = self._routed_activations(hidden_TD, routing, first, stop)
            output_RD = self._down(rows_RF, routing.bounds(first, stop), first)
            torch.linalg.vector_norm(output_RD, dim=-1, dtype=torch.float32, out=norms_R[low:high])
            torch.mul(output_RD, gates_R[low:high, None], out=gated_RD[low:high])
        self._add_routed(routing.bounds(0, num_experts), gates_R, gates_R.float() * norms_R)
        output_TD = torch.empty_like(hidden_TD)
        ranks = routing.rank_R.view(top_k_index_Tk.shape).split(_SUMMED_TOKENS[hidden_TD.device.type])
        for out, rank_Ck in zip(output_TD.split(len(ranks[0])), ranks, strict=True):
            out.copy_(gated_RD.index_select(0, rank_Ck.flatten()).view(*rank_Ck.shape, -1).sum(1))
        return output_TD

    def _routed_activations(self, hidden_TD: Tensor, routing: Routing, first: int, stop: int) -> Tensor:
        """Activations [R', F] of the routed pairs of experts [first, stop), in their order; adds those of all tokens up.

        Below them, rows of zeros (see `room_for`).
        """
        begin = routing.begin(first)
        rows_RF = self._new_rows(hidden_TD, routing.bounds(first, stop))
        for start, end in self._groups(first, stop):
            for chunk, a_CGF in enumerate(self._activations(hidden_TD, start, end)):
                for expert in range(start, end):
                    low, high = routing.begin(expert, chunk), routing.begin(expert, chunk + 1)
                    tokens = routing.tokens_R[low:high] - chunk * self.blocks.num_tokens
                    torch.index_select(a_CGF[:, expert - start], 0, tokens, out=rows_RF[low - begin : high - begin])
        return rows_RF

    def _new_rows(self, hidden_TD: Tensor, bounds: Sequence[int]) -> Tensor:
        """Room for activations that `_down` takes: zeros below the last."""
        rows_RF = hidden_TD.new_empty(room_for(bounds, hidden_TD.device), self.weights.intermediate)
        rows_RF[bounds[-1] :] = 0
        return rows_RF

    def _down(self, rows_RF: Tensor, bounds: Sequence[int], first: int) -> Tensor:
        """Outputs [R', D] of the rows of experts from `first` on. bounds: where each expert's rows begin, and the end.

        rows_RF has room for padding. A padded product runs into the rows of the next experts, whose own products then overwrite
        what it put there.
        """
        if self._is_grouped and len(bounds) > 2:  # of one expert's rows, which may be none, there is nothing to group
            return grouped_down(self.weights, rows_RF[: bounds[-1]], bounds, first)
        output_RD = rows_RF.new_empty(len(rows_RF), self.weights.hidden_size)
        for expert, (low, high) in enumerate(pairwise(bounds), first):
            if low < high:
                rows = slice(low, low + padded(high - low, rows_RF.device))
                self._product(rows_RF[rows], "down_proj", expert, expert + 1, output_RD[rows])
                self.weights.release("down_proj", expert, expert + 1)
        return output_RD[: bounds[-1]]

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

    def _forward(self) -> Callable[..., Tensor]:
        return self._forward_blocks

    def _watch_router(self, _module: nn.Module, args: Any, output: Any) -> None:
        self._hidden_TD: Tensor = args[0]
        self._scores_TE, logits_TE = output
        self._add_logits(logits_TE)

    def _forward_blocks(self, gated_rows: Tensor) -> Tensor:
        gated_ETD = gated_rows.view(self.weights.num_experts, -1, gated_rows.shape[-1])
        out_ETD = torch.zeros_like(gated_ETD)
        self._sum_unrouted(self._hidden_TD)
        self.num_tokens += gated_ETD.shape[1]
        bounds, gates, norms = [0], [], []
        for expert in range(self.weights.num_experts):
            (tokens,) = torch.where(self._scores_TE[:, expert] > 0)
            bounds.append(bounds[-1] + len(tokens))
            rows = self._expert_activations(gated_ETD[expert], tokens, expert)
            output = self._down(rows, [0, len(tokens)], expert)
            out_ETD[expert, tokens] = output
            gates.append(self._scores_TE[tokens, expert])
            norms.append(torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32))
        self._add_routed(bounds, torch.cat(gates), torch.cat(norms))
        return out_ETD.view(gated_rows.shape)
