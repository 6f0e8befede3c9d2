"""Runs the experts of one MoE layer in place of transformers' own module, and shows what they compute on the way.

Dimensions: T tokens, B tokens of a block, D hidden size, F intermediate size, P what the first product gives an expert (2 F
with a gate, else F), E experts, S experts of a stack, k experts a token, R = T k routed pairs of a token and an expert.

Activations a_e = act(W_gate x) * W_up x are made for a block of tokens and a stack of experts at a time, so that what is done
with them element by element stays in the processor's cache. Of those only the routed rows are kept, for one product with W_down
an expert.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from stages.model.expert_weights import ExpertWeights
from stages.model.products import can_group, gates_by_halves, grouped_down, padded, room_for
from stages.model.routing import Routing

_BLOCK_BYTES = defaultdict(lambda: 1 << 28, cpu=1 << 21)
"""Bytes of first products at a time, by kind of device: what a core's cache takes. A fixed number, since bits depend on it."""
_LEAST_BLOCK = 512
_STACK_COLUMNS = 2048
"""A product has about this many columns. Small experts are multiplied together, because every call has its price."""
_SUMMED_TOKENS = defaultdict(lambda: 1 << 20, cpu=128)
"""Tokens whose float32 values are made at once to be added up, by kind of device. They must stay in the cache, too."""


@dataclass(frozen=True)
class Blocks:
    """How the work of a layer is cut, to tokens of a block and experts of a stack. Follows from shapes and kind of device."""

    num_tokens: int
    num_experts: int

    @classmethod
    def of(cls, weights: ExpertWeights) -> "Blocks":
        """Experts are stacked only where their matrices can be one."""
        columns, can_join = weights.num_columns(weights.layout.first), weights.can_join(weights.layout.first)
        stack = min(weights.num_experts, max(1, _STACK_COLUMNS // columns)) if can_join else 1
        most = _BLOCK_BYTES[weights.device.type] // (stack * columns * weights.dtype.itemsize)
        return cls(max(_LEAST_BLOCK, 1 << max(most, 1).bit_length() - 1), stack)


@dataclass(frozen=True)
class Activations:
    """Activations of experts [first, stop) on a block of tokens, a_BSF, whether the tokens are routed to them or not."""

    first: int
    stop: int
    a_BSF: Tensor

    def add_to(self, total_SF: Tensor) -> None:
        """Add the sum over tokens to float64 totals: float32 inside of the tokens that are added at once, float64 across."""
        for part in self.a_BSF.split(_SUMMED_TOKENS[self.a_BSF.device.type]):
            total_SF += part.sum(0, dtype=torch.float32)


@dataclass(frozen=True)
class RoutedPairs:
    """The routed pairs of experts [first, stop), sorted by expert, then by token.

    bounds: where the pairs of each expert begin, and the end. tokens_R: the token of each pair. gates_R: the weight that the
    model gives it. output_RD: what W_down gives. gates_input: whether the gate multiplies the expert's input instead of its
    output; it is then in output_RD.
    """

    first: int
    stop: int
    bounds: Sequence[int]
    tokens_R: Tensor
    gates_R: Tensor
    output_RD: Tensor
    gates_input: bool

    @property
    def experts(self) -> slice:
        """Index of these experts in what has one entry for each expert of the layer."""
        return slice(self.first, self.stop)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of pairs of each expert."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    @cached_property
    def num_pairs_S(self) -> Tensor:
        """The same as a tensor."""
        return torch.tensor(self.sizes, device=self.gates_R.device)

    @cached_property
    def output_norms_R(self) -> Tensor:
        """Norm, float32, of each pair's output: ||E_e(x)||, or ||E_e(gate x)||."""
        norms_R: Tensor = torch.linalg.vector_norm(self.output_RD, dim=-1, dtype=torch.float32)
        return norms_R

    @cached_property
    def added_norms_R(self) -> Tensor:
        """Norm, float32, of what each pair adds to the layer's output: gate * ||E_e(x)||, or ||E_e(gate x)||."""
        return self.output_norms_R if self.gates_input else self.gates_R.float() * self.output_norms_R

    def sum_by_expert(self, values_R: Tensor) -> Tensor:
        """Sum of one value a pair for each expert, float64 [S]."""
        return torch.stack([part.sum() for part in values_R.double().split(self.sizes)])


class ExpertsForward:
    """The forward of one layer's experts. What it returns is what the model's own gives, up to rounding."""

    def __init__(self, weights: ExpertWeights) -> None:
        self.weights, self.experts = weights, weights.experts
        self.blocks = Blocks.of(weights)
        self._is_grouped = can_group(weights)
        self._halves_gate = gates_by_halves(self.experts)

    def unrouted(self, hidden_TD: Tensor) -> Iterator[Activations]:
        """Activations of every expert on all tokens, block by block."""
        for first, stop in self._stacks(0, self.weights.num_experts):
            yield from self._activations(hidden_TD, first, stop)

    def output_gated(
        self,
        hidden_TD: Tensor,
        top_k_index_Tk: Tensor,
        top_k_weights_Tk: Tensor,
        see_routed: Callable[[RoutedPairs], None],
        see_unrouted: Callable[[Activations], None] | None = None,
    ) -> Tensor:
        """The forward [T, D] where gates multiply outputs. The routing is what the model passes.

        see_unrouted: if given, every expert runs on all tokens, once, and the routed rows are taken from there. Otherwise an
        expert runs on its routed tokens only.
        Gated outputs are rounded and summed over k as transformers' own `grouped_mm` does, so that later layers see what they
        see in the model.
        """
        num_experts = self.weights.num_experts
        routing = Routing(top_k_index_Tk, num_experts, self.blocks.num_tokens)
        gates_R = top_k_weights_Tk.flatten()[routing.slots_R]
        dtype = torch.promote_types(hidden_TD.dtype, gates_R.dtype)
        gated_RD = torch.empty((len(gates_R), hidden_TD.shape[1]), dtype=dtype, device=hidden_TD.device)
        gated_RD[routing.begin(num_experts) :] = 0  # slots of no expert
        for first, stop in [(0, num_experts)] if self._is_grouped else self._stacks(0, num_experts):
            low, high = routing.begin(first), routing.begin(stop)
            bounds = routing.bounds(first, stop)
            if see_unrouted is None:
                rows_RF = self._routed_rows(hidden_TD, routing, first, stop)
            else:
                rows_RF = self._rows_of_all(hidden_TD, routing, first, stop, see_unrouted)
            output_RD = self._down(rows_RF, bounds, first)
            see_routed(RoutedPairs(first, stop, bounds, routing.tokens_R[low:high], gates_R[low:high], output_RD, False))
            torch.mul(output_RD, gates_R[low:high, None], out=gated_RD[low:high])
        output_TD = torch.empty_like(hidden_TD)
        ranks = routing.rank_R.view(top_k_index_Tk.shape).split(_SUMMED_TOKENS[hidden_TD.device.type])
        for out, rank_Bk in zip(output_TD.split(len(ranks[0])), ranks, strict=True):
            out.copy_(gated_RD.index_select(0, rank_Bk.flatten()).view(*rank_Bk.shape, -1).sum(1))
        return output_TD

    def input_gated(self, gated_rows: Tensor, scores_TE: Tensor, see_routed: Callable[[RoutedPairs], None]) -> Tensor:
        """The forward of Llama 4, whose gates multiply inputs.

        gated_rows [E T, D]: one block of rows for each expert, gate times x, and zeros where a token is not routed. scores_TE:
        the gates.
        """
        gated_ETD = gated_rows.view(self.weights.num_experts, -1, gated_rows.shape[-1])
        out_ETD = torch.zeros_like(gated_ETD)
        for expert in range(self.weights.num_experts):
            (tokens_R,) = torch.where(scores_TE[:, expert] > 0)
            bounds = [0, len(tokens_R)]
            output_RD = self._down(self._expert_activations(gated_ETD[expert], tokens_R, expert), bounds, expert)
            out_ETD[expert, tokens_R] = output_RD
            gates_R = scores_TE[tokens_R, expert]
            see_routed(RoutedPairs(expert, expert + 1, bounds, tokens_R, gates_R, output_RD, True))
        return out_ETD.view(gated_rows.shape)

    def _stacks(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        for start in range(first, stop, self.blocks.num_experts):
            yield start, min(start + self.blocks.num_experts, stop)

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

    def activate(self, products: Tensor) -> Tensor:
        """[..., P] to [..., F], by the module's own gate, in which families differ. Overwrites what it is given."""
        if not self.weights.layout.has_gate:
            return self.experts.act_fn(products)  # type: ignore[no-any-return]
        if self._halves_gate:  # as the module does it, in less memory
            gate, up = products.chunk(2, dim=-1)
            return self.experts.act_fn(gate).mul_(up)  # type: ignore[no-any-return]
        return self.experts._apply_gate(products)  # type: ignore[no-any-return]

    def _activations(self, hidden_TD: Tensor, first: int, stop: int) -> Iterator[Activations]:
        """Of a stack of experts on all tokens, block by block. A block's memory is used again for the next one."""
        blocks = hidden_TD.split(self.blocks.num_tokens)
        products = self._first_product(blocks[0], first, stop)
        for number, hidden_BD in enumerate(blocks):
            if number:
                products = self._first_product(hidden_BD, first, stop, products)
            yield Activations(first, stop, self.activate(products.view(len(hidden_BD), stop - first, -1)))
        self.weights.release(self.weights.layout.first, first, stop)

    def _expert_activations(self, hidden_TD: Tensor, tokens_R: Tensor, expert: int) -> Tensor:
        """Activations of one expert on some tokens, [R, F]; below them, rows of padding (see `padded`)."""
        padding = padded(len(tokens_R), hidden_TD.device) - len(tokens_R)
        x = hidden_TD[functional.pad(tokens_R, (0, padding))]
        activations = self.activate(self._first_product(x, expert, expert + 1))
        self.weights.release(self.weights.layout.first, expert, expert + 1)
        return activations

    def _routed_rows(self, hidden_TD: Tensor, routing: Routing, first: int, stop: int) -> Tensor:
        """Activations [R', F] of the routed pairs of experts [first, stop), in their order.

        Below them, rows of zeros (see `room_for`).
        """
        begin = routing.begin(first)
        rows_RF = self._new_rows(hidden_TD, routing.bounds(first, stop))
        for expert in range(first, stop):
            low, high = routing.begin(expert), routing.begin(expert + 1)
            activations = self._expert_activations(hidden_TD, routing.tokens_R[low:high], expert)
            rows_RF[low - begin : high - begin] = activations[: high - low]
        return rows_RF

    def _rows_of_all(
        self, hidden_TD: Tensor, routing: Routing, first: int, stop: int, see: Callable[[Activations], None]
    ) -> Tensor:
        """The same, taken from the activations on all tokens, each of which `see` is given."""
        begin = routing.begin(first)
        rows_RF = self._new_rows(hidden_TD, routing.bounds(first, stop))
        for start, end in self._stacks(first, stop):
            for block, activations in enumerate(self._activations(hidden_TD, start, end)):
                see(activations)
                for expert in range(start, end):
                    low, high = routing.begin(expert, block), routing.begin(expert, block + 1)
                    tokens = routing.tokens_R[low:high] - block * self.blocks.num_tokens
                    rows = rows_RF[low - begin : high - begin]
                    torch.index_select(activations.a_BSF[:, expert - start], 0, tokens, out=rows)
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
