"""Collector of each expert's mean output over all tokens, routed to it or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sum, Summed, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import UnroutedView
    from stages.contracts.arrow import Array

BY_CELL = "output_sum_by_cell"
"""Name under which `finish` returns the sums by cell, float64 [E, C, D]. They are stored in a separate file."""


class OutputSum(Collector):
    """HC-SMoE's expert feature (arXiv:2410.08589, eq. 4), as a sum.

    The sum is taken before W_down, because sum_t W_down a_t = W_down sum_t a_t. So W_down is applied once per layer and not
    once per token.
    """

    name = "output_sum"
    columns = (Column("output_sum", "sum over {tokens} of E_e(x), not gated; x is the input of the MoE block", "[D]"),)

    @property
    def sums(self) -> tuple[Sum, ...]:
        """The input of W_down, act(W_gate x) * W_up x, summed by cell."""
        return (Sum("activation_sum", "[C F]"),)

    def observe_unrouted(self, sums: Sums, unrouted: UnroutedView) -> None:
        """Add activations."""
        unrouted.add_to(sums["activation_sum"])

    def finish(self, sums: Mapping[str, Array], summed: Summed) -> Mapping[str, Array]:
        """Apply W_down."""
        output_sum_ECD = summed.through_w_down(sums["activation_sum"])
        return {"output_sum": output_sum_ECD.sum(1), BY_CELL: output_sum_ECD}
