"""A collector: the largest gate-weighted output norm of each expert. A maximum adds up by a method of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from stages.calibrate.collectors.base import Collector, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RoutedView
    from stages.contracts.arrow import Array


class Loudest(Collector):
    """Largest norm of what an expert adds to the layer's output."""

    name = "loudest"
    columns = (Column("largest_norm", "largest gate * ||E_e(x)||_2 over routed tokens"),)

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        pairs = routed.pairs
        norms_R = pairs.output_RD.double().norm(dim=1) * pairs.gates_R
        for expert, some_R in enumerate(norms_R.split(pairs.sizes), pairs.first):
            if len(some_R):
                sums["largest_norm"][expert].clamp_(min=some_R.max())

    def add(self, one: Mapping[str, Array], other: Mapping[str, Array]) -> Mapping[str, Array]:
        return {name: np.maximum(values, other[name]) for name, values in one.items()}
