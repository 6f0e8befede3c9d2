"""Collector of the largest value that each expert's down projection gives, by which super experts are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RoutedView
    from stages.contracts.arrow import Array


class LargestDownOutput(Collector):
    """The largest |component| of E_e(x) over routed tokens, before the gate (Super Experts, arXiv:2507.23279).

    Where the gate multiplies the expert's input (Llama 4), it is already in the output. Zero for an expert that is never used.
    """

    name = "largest_down_output"
    columns = (Column("largest_down_output", "largest absolute component of E_e(x) over routed tokens", over_domains="max"),)

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Raise the maxima."""
        pairs = routed.pairs
        for expert, some_RD in enumerate(pairs.output_RD.split(pairs.sizes), pairs.first):
            if len(some_RD):
                sums["largest_down_output"][expert].clamp_(min=some_RD.abs().max().double())

    def add(self, one: Mapping[str, Array], other: Mapping[str, Array]) -> Mapping[str, Array]:
        """The larger of both."""
        return {name: np.maximum(values, other[name]) for name, values in one.items()}
