"""Inner products of the experts' weights, from which their distances follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sum, Summed
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.contracts.arrow import Array


class WeightGram(Collector):
    """Nothing is gathered from tokens: the unit that finishes a layer's sums holds its weights, and adds their products up in
    float64, a block of every expert at a time. Cost: one more pass over the layer's weights, E products a weight."""

    name = "weight_gram"
    columns = (Column("weight_gram", "row e of w_e . w_e', w all weights and biases of an expert", "[E]", over_domains="same"),)

    @property
    def sums(self) -> tuple[Sum, ...]:
        """None over tokens."""
        return ()

    def finish(self, sums: Mapping[str, Array], summed: Summed) -> Mapping[str, Array]:
        """Read the weights."""
        return {"weight_gram": summed.weight_gram()}
