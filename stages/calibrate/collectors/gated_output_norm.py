"""Collector of the size of each expert's contribution to the layer's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RoutedView


class GatedOutputNorm(Collector):
    """Sum of the norms of gated outputs: the numerator of REAP's saliency (arXiv:2510.13999).
    Its denominator is the number of routed tokens."""

    name = "gated_output_norm"
    columns = (Column("gated_output_norm_sum", "sum over routed tokens of gate * ||E_e(x)||_2"),)

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Add the norms of the pairs' contributions to the layer's output."""
        pairs = routed.pairs
        sums["gated_output_norm_sum"][pairs.experts] += pairs.sum_by_expert(pairs.added_norms_R)
