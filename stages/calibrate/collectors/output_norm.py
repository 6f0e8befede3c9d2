"""Collector of the size of each expert's outputs, without the gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RoutedView


class OutputNorm(Collector):
    """Sum of output norms: the numerator of the expert activation norm (EAN; a baseline of REAP, arXiv:2510.13999).

    Where the gate multiplies the expert's input (Llama 4), the norm is ||E_e(gate x)||: the model computes no other output.
    """

    name = "output_norm"
    columns = (Column("output_norm_sum", "sum over routed tokens of ||E_e(x)||_2"),)

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Add norms of outputs."""
        pairs = routed.pairs
        sums["output_norm_sum"][pairs.experts] += pairs.sum_by_expert(pairs.output_norms_R)
