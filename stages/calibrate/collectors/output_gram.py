"""Inner products of the outputs of experts, token by token, from which their distances on every token follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import InputView

_BLOCK_BYTES = 1 << 28
"""Outputs of all experts that are held at a time."""
_LEAST_BLOCK = 64
"""Tokens of a block at least. A product of fewer rows costs as much on a CPU (`stages.model.products.padded`)."""
_PIECE_VALUES = 1 << 22
"""Values that are converted to float64 at a time."""


class OutputGram(Collector):
    """Every expert's output on every token, routed to it or not, in the model's dtype: W_down is applied token by token, and
    gate and up products are made once more. That is (2 P + F) / P more of calibrate's unrouted products, P columns of gate and
    up: two and a half times the time with a gate. Under sampling only the sampled tokens.
    """

    name = "output_gram"
    columns = (Column("output_gram", "row e of sum over {tokens} of E_e(x) . E_e'(x), not gated", "[E]"),)

    def observe_input(self, sums: Sums, view: InputView) -> None:
        """Add the products of the outputs, in float64."""
        import torch

        num_experts, hidden_size = len(sums["output_gram"]), view.hidden_TD.shape[1]
        most = max(_LEAST_BLOCK, _BLOCK_BYTES // (num_experts * hidden_size * view.hidden_TD.itemsize))
        piece = max(1, _PIECE_VALUES // (num_experts * hidden_size))
        for chosen in view.unrouted():
            for tokens in chosen.split(most):
                outputs = [view.forward.outputs_of(view.hidden_TD, tokens, expert) for expert in range(num_experts)]
                for some in torch.stack(outputs).split(piece, dim=1):
                    flat = some.double().flatten(1)
                    sums["output_gram"].add_(flat @ flat.T)
