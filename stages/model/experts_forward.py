"""Runs the experts of one MoE layer in place of transformers' own module, and passes intermediate results to callbacks.

Dimensions: T tokens, B tokens of a block, D hidden size, F intermediate size, P columns of the first product (2 F with a gate,
else F), E experts, S experts of a stack, k experts a token, R = T k routed pairs of a token and an expert.

Activations a_e = act(W_gate x) * W_up x are computed for one block of tokens and one stack of experts at a time, so that
elementwise operations on them stay in the processor's cache. Only the activations of routed pairs are kept, for one product
with W_down per expert.
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
"""Bytes of first products computed at a time, by kind of device: the size of a core's cache.
Fixed, because result bits depend on it."""
_LEAST_BLOCK = 512
_STACK_COLUMNS = 2048
"""Approximate number of columns of a product. Small experts are multiplied together, because every call has a fixed cost."""
_SUMMED_TOKENS = defaultdict(lambda: 1 << 20, cpu=128)
"""Tokens whose float32 values are summed at a time, by kind of device. These values must stay in the cache, too."""


@dataclass(frozen=True)
class Blocks:
    """Sizes of token blocks and expert stacks into which a layer's work is cut.
    They follow from shapes and the kind of device."""

    num_tokens: int
    num_experts: int

    @classmethod
    def of(cls, weights: ExpertWeights) -> "Blocks":
        """Compute the sizes. Experts are stacked only if their matrices can be used as one."""
        columns, can_join = weights.num_columns(weights.layout.first), weights.can_join(weights.layout.first)
        stack = min(weights.num_experts, max(1, _STACK_COLUMNS // columns)) if can_join else 1
        most = _BLOCK_BYTES[weights.device.type] // (stack * columns * weights.dtype.itemsize)
        return cls(max(_LEAST_BLOCK, 1 << max(most, 1).bit_length() - 1), stack)


@dataclass(frozen=True)
class Activations:
    """Activations of experts [first, stop) on a block of tokens, a_BSF, routed to them or not."""

    first: int
    stop: int
    a_BSF: Tensor

    def add_to(self, total_SF: Tensor) -> None:
        """Add the sum over tokens to float64 totals.
        A few tokens at a time are summed in float32, and these sums in float64."""
        for part in self.a_BSF.split(_SUMMED_TOKENS[self.a_BSF.device.type]):
            total_SF += part.sum(0, dtype=torch.float32)


@dataclass(frozen=True)
class RoutedPairs:
    """The routed pairs of experts [first, stop), sorted by expert, then by token.

    bounds: first pair of each expert, and the end. tokens_R: token of each pair. gates_R: gate that the model gives to each
    pair. output_RD: result of W_down. gates_input: whether the gate multiplies the expert's input instead of its output;
    output_RD then already includes it. activations_RF: what W_down is applied to.
    """

    first: int
    stop: int
    bounds: Sequence[int]
    tokens_R: Tensor
    gates_R: Tensor
    output_RD: Tensor
    gates_input: bool
    activations_RF: Tensor

    @property
    def experts(self) -> slice:
        """These experts as a slice of an array with one entry for each expert of the layer."""
        return slice(self.first, self.stop)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of pairs of each expert."""
        return [stop - start for start, stop in pairwise(self.bounds)]

    @cached_property
    def num_pairs_S(self) -> Tensor:
        """Number of pairs of each expert, as a tensor [S]."""
        return torch.tensor(self.sizes, device=self.gates_R.device)

    @cached_property
    def output_norms_R(self) -> Tensor:
        """Norm, float32, of each pair's output: ||E_e(x)||, or ||E_e(gate x)||."""
        norms_R: Tensor = torch.linalg.vector_norm(self.output_RD, dim=-1, dtype=torch.float32)
        return norms_R

    @cached_property
    def added_norms_R(self) -> Tensor:
        """Norm, float32, of each pair's contribution to the layer's output: gate * ||E_e(x)||, or ||E_e(gate x)||."""
        return self.output_norms_R if self.gates_input else self.gates_R.float() * self.output_norms_R

    def sum_by_expert(self, values_R: Tensor) -> Tensor:
        """Sum of one value per pair for each expert, float64 [S]."""
        return torch.stack([part.sum() for part in values_R.double().split(self.sizes)])


class ExpertsForward:
    """The forward of one layer's experts. Its result equals that of the model's own forward, up to rounding.

    pads_unrouted: whether products of all tokens are padded as those of routed tokens are (`products.padded`): where the number
    of tokens is a new one almost every time.
    """

    def __init__(self, weights: ExpertWeights, pads_unrouted: bool = False) -> None:
        self.weights, self.experts, self._pads_unrouted = weights, weights.experts, pads_unrouted
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
        """The forward [T, D] for gates that multiply outputs. The routing is passed in by the model.

        see_unrouted: if given, every expert runs once on all tokens, and the routed rows are taken from the results. Otherwise
        an expert runs only on its routed tokens. Gated outputs are rounded and summed over k exactly as in transformers' own
        `grouped_mm`, so that later layers get the same input as in the model.
        """
        num_experts = self.weights.num_experts
        routing = Routing(top_k_index_Tk, num_experts, self.blocks.num_tokens)
        gates_R = top_k_weights_Tk.flatten()[routing.slots_R]
        dtype = torch.promote_types(hidden_TD.dtype, gates_R.dtype)
        gated_RD = torch.empty((len(gates_R), hidden_TD.shape[1]), dtype=dtype, device=hidden_TD.device)
        gated_RD[routing.begin(num_experts) :] = 0  # pairs without an expert
        for first, stop in [(0, num_experts)] if self._is_grouped else self._stacks(0, num_experts):
            low, high = routing.begin(first), routing.begin(stop)
            bounds = routing.bounds(first, stop)
            if see_unrouted is None:
                rows_RF = self._routed_rows(hidden_TD, routing, first, stop)
            else:
                rows_RF = self._rows_of_all(hidden_TD, routing, first, stop, see_unrouted)
            output_RD = self._down(rows_RF, bounds, first)
            tokens_R, some_gates_R, seen_RF = routing.tokens_R[low:high], gates_R[low:high], rows_RF[: high - low]
            see_routed(RoutedPairs(first, stop, bounds, tokens_R, some_gates_R, output_RD, False, seen_RF))
            torch.mul(output_RD, gates_R[low:high, None], out=gated_RD[low:high])
        output_TD = torch.empty_like(hidden_TD)
        ranks = routing.rank_R.view(top_k_index_Tk.shape).split(_SUMMED_TOKENS[hidden_TD.device.type])
        for out, rank_Bk in zip(output_TD.split(len(ranks[0])), ranks, strict=True):
            out.copy_(gated_RD.index_select(0, rank_Bk.flatten()).view(*rank_Bk.shape, -1).sum(1))
        return output_TD

    def input_gated(self, gated_rows: Tensor, scores_TE: Tensor, see_routed: Callable[[RoutedPairs], None]) -> Tensor:
        """The forward of Llama 4, whose gates multiply inputs.

        gated_rows [E T, D]: one block of rows per expert, gate times x; zeros where a token is not routed. scores_TE: the
        gates.
        """
        gated_ETD = gated_rows.view(self.weights.num_experts, -1, gated_rows.shape[-1])
        out_ETD = torch.zeros_like(gated_ETD)
        for expert in range(self.weights.num_experts):
            (tokens_R,) = torch.where(scores_TE[:, expert] > 0)
            bounds = [0, len(tokens_R)]
            rows_RF = self._expert_activations(gated_ETD[expert], tokens_R, expert)
            output_RD = self._down(rows_RF, bounds, expert)
            out_ETD[expert, tokens_R] = output_RD
            gates_R = scores_TE[tokens_R, expert]
            seen_RF = rows_RF[: len(tokens_R)]
            see_routed(RoutedPairs(expert, expert + 1, bounds, tokens_R, gates_R, output_RD, True, seen_RF))
        return out_ETD.view(gated_rows.shape)

    def _stacks(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        for start in range(first, stop, self.blocks.num_experts):
            yield start, min(start + self.blocks.num_experts, stop)

    def _product(self, x: Tensor, name: str, first: int, stop: int, out: Tensor) -> Tensor:
        """Fill `out` with rows times the matrices of experts [first, stop), plus biases: [rows, (stop - first) P or D]."""
        for column, matrix in self.weights.matrices(name, first, stop):
            torch.mm(x, matrix, out=out[:, column : column + matrix.shape[1]])
        bias = self.weights.bias(name, first, stop)
        return out if bias is None else out.add_(bias)

    def _first_product(self, x: Tensor, first: int, stop: int, out: Tensor | None = None) -> Tensor:
        """First products [rows, (stop - first) P], written to `out` if given, which may have more rows."""
        name = self.weights.layout.first
        if out is None:
            out = x.new_empty(len(x), (stop - first) * self.weights.num_columns(name))
        return self._product(x, name, first, stop, out[: len(x)])

    def activate(self, products: Tensor) -> Tensor:
        """Activations [..., F] of first products [..., P] by the module's own gate, which differs between families.
        Overwrites its input."""
        if not self.weights.layout.has_gate:
            return self.experts.act_fn(products)  # type: ignore[no-any-return]
        if self._halves_gate:  # same result as the module's method, in less memory
            gate, up = products.chunk(2, dim=-1)
            return self.experts.act_fn(gate).mul_(up)  # type: ignore[no-any-return]
        return self.experts._apply_gate(products)  # type: ignore[no-any-return]

    def _activations(self, hidden_TD: Tensor, first: int, stop: int) -> Iterator[Activations]:
        """Activations of a stack of experts on all tokens, block by block.
        The next block reuses the memory of the previous one."""
        products: Tensor | None = None
        for hidden_BD in hidden_TD.split(self.blocks.num_tokens):
            rows = padded(len(hidden_BD), hidden_TD.device) if self._pads_unrouted else len(hidden_BD)
            x = functional.pad(hidden_BD, (0, 0, 0, rows - len(hidden_BD))) if rows > len(hidden_BD) else hidden_BD
            products = self._first_product(x, first, stop, products)
            yield Activations(first, stop, self.activate(products.view(len(x), stop - first, -1))[: len(hidden_BD)])
        self.weights.release(self.weights.layout.first, first, stop)

    def activations_of(self, hidden_TD: Tensor, tokens_R: Tensor, expert: int) -> Tensor:
        """Activations [R, F] of one expert on some tokens."""
        return self._expert_activations(hidden_TD, tokens_R, expert)[: len(tokens_R)]

    def outputs_of(self, hidden_TD: Tensor, tokens_R: Tensor, expert: int) -> Tensor:
        """Outputs [R, D] of one expert on some tokens."""
        return self.outputs_from(self._expert_activations(hidden_TD, tokens_R, expert), expert)[: len(tokens_R)]

    def outputs_from(self, activations_RF: Tensor, expert: int) -> Tensor:
        """Outputs [R, D] of one expert, given what its W_down is applied to."""
        num_rows = len(activations_RF)
        padding = padded(num_rows, activations_RF.device) - num_rows
        rows_RF = functional.pad(activations_RF, (0, 0, 0, padding)) if padding else activations_RF
        output_RD = rows_RF.new_empty(len(rows_RF), self.weights.hidden_size)
        self._product(rows_RF, "down_proj", expert, expert + 1, output_RD)
        self.weights.release("down_proj", expert, expert + 1)
        return output_RD[:num_rows]

    def _expert_activations(self, hidden_TD: Tensor, tokens_R: Tensor, expert: int) -> Tensor:
        """Activations [R, F] of one expert on some tokens, followed by rows of padding as `padded` requires."""
        padding = padded(len(tokens_R), hidden_TD.device) - len(tokens_R)
        x = hidden_TD[functional.pad(tokens_R, (0, padding))]
        activations = self.activate(self._first_product(x, expert, expert + 1))
        self.weights.release(self.weights.layout.first, expert, expert + 1)
        return activations

    def _routed_rows(self, hidden_TD: Tensor, routing: Routing, first: int, stop: int) -> Tensor:
        """Activations [R', F] of the routed pairs of experts [first, stop), in their order.

        Rows of zeros follow, as many as `room_for` requires.
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
        """Like `_routed_rows`, but taken from activations on all tokens. Each block of these is passed to `see`."""
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
        """Memory for the activations that `_down` takes. The rows behind the last pair are zeros."""
        rows_RF = hidden_TD.new_empty(room_for(bounds, hidden_TD.device), self.weights.intermediate)
        rows_RF[bounds[-1] :] = 0
        return rows_RF

    def _down(self, rows_RF: Tensor, bounds: Sequence[int], first: int) -> Tensor:
        """Outputs [R', D] of experts from `first` on. bounds: first row of each expert, and the end.

        rows_RF has room for padding. A padded product also writes rows of the next experts, whose own products then overwrite
        them.
        """
        if self._is_grouped and len(bounds) > 2:  # a single expert, which may have no rows, gains nothing by grouping
            return grouped_down(self.weights, rows_RF[: bounds[-1]], bounds, first)
        output_RD = rows_RF.new_empty(len(rows_RF), self.weights.hidden_size)
        for expert, (low, high) in enumerate(pairwise(bounds), first):
            if low < high:
                rows = slice(low, low + padded(high - low, rows_RF.device))
                self._product(rows_RF[rows], "down_proj", expert, expert + 1, output_RD[rows])
                self.weights.release("down_proj", expert, expert + 1)
        return output_RD[: bounds[-1]]
