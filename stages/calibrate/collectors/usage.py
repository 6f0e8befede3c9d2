"""Collector of how often the router picks each expert, and with which gates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RoutedView


class Usage(Collector):
    """HC-SMoE's frequency (arXiv:2410.08589, eq. 6), and the sum of gates."""

    name = "usage"
    columns = (
        Column("num_routed_tokens", "tokens whose top-k holds the expert, f_e", dtype="int64"),
        Column("gate_sum", "sum over routed tokens of the weight that the model gave the expert"),
    )

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Count pairs and add their gates."""
        pairs = routed.pairs
        sums["num_routed_tokens"][pairs.experts] += pairs.num_pairs_S
        sums["gate_sum"][pairs.experts] += pairs.sum_by_expert(pairs.gates_R)
