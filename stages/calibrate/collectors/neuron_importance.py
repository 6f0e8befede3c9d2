"""How much each neuron of an expert adds to the layer's output on the tokens that are routed to the expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.calibrate.collectors.base import Collector, Sum, Summed, Sums
from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from stages.calibrate.observations import RoutedView
    from stages.contracts.arrow import Array


class NeuronImportance(Collector):
    """The energy of a neuron's own contribution, as if it were the only one: what is lost without it, before any refit.

    Where the gate multiplies the expert's input (Llama 4), it is already in the activation.
    """

    name = "neuron_importance"
    columns = (
        Column("neuron_importance_sum", "sum over routed tokens of (gate * a_n(x))^2 * ||column n of W_down||^2", "[F]"),
    )

    @property
    def sums(self) -> tuple[Sum, ...]:
        """Squared activations times gates; the norms of W_down come in at the end."""
        return (Sum("energy", "[F]"),)

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Add squares, in float64 a block of one expert's pairs at a time."""
        pairs = routed.pairs
        for expert, (a_RF, gate_R) in enumerate(
            zip(pairs.activations_RF.split(pairs.sizes), pairs.gates_R.split(pairs.sizes), strict=True), pairs.first
        ):
            for some_RF, some_R in zip(a_RF.split(1024), gate_R.split(1024), strict=True):
                gated_RF = some_RF.double() if pairs.gates_input else some_RF.double() * some_R.double()[:, None]
                sums["energy"][expert] += gated_RF.square_().sum(0)

    def finish(self, sums: Mapping[str, Array], summed: Summed) -> Mapping[str, Array]:
        """Multiply by the squared norms of the columns of W_down."""
        return {"neuron_importance_sum": sums["energy"] * summed.down_square_norms()}
