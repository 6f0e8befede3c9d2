"""Collector of each expert's contribution to the layer's output on its routed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RoutedView


class GatedOutput(Collector):
    """Sum of an expert's gated outputs, a vector. Needs one float64 copy of the routed outputs of a stack of experts."""

    name = "gated_output"
    columns = (Column("gated_output_sum", "sum over routed tokens of gate * E_e(x)", "[D]"),)

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Add outputs times gates."""
        pairs = routed.pairs
        added_RD = pairs.output_RD.double()
        if not pairs.gates_input:
            added_RD *= pairs.gates_R.double()[:, None]
        for expert, some_RD in enumerate(added_RD.split(pairs.sizes), pairs.first):
            sums["gated_output_sum"][expert] += some_RD.sum(0)
