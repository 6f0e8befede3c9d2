"""How much an expert adds to the layer's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RoutedView


class GatedOutputNorm(Collector):
    """The numerator of REAP's saliency (arXiv:2510.13999); its denominator is the number of routed tokens."""

    name = "gated_output_norm"
    columns = (Column("gated_output_norm_sum", "sum over routed tokens of gate * ||E_e(x)||_2"),)

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Add norms of what pairs add to the output."""
        pairs = routed.pairs
        sums["gated_output_norm_sum"][pairs.experts] += pairs.sum_by_expert(pairs.added_norms_R)
