"""What every collector has. No torch is imported here or in a collector, because the driver reads what they declare.

Dimensions: C cells, D hidden size, E experts, F intermediate size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from torch import Tensor

    from stages.calibrate.observations import RoutedView, RouterView, UnroutedView
    from stages.contracts.arrow import Array

Sums = Mapping[str, "Tensor"]
"""The sums of one collector over one token shard, by name; the first axis is that of the experts."""


@dataclass(frozen=True)
class Sum:
    """A sum that a collector keeps for each expert. shape: of one expert's part, letters of the legend above in brackets.

    A sum is kept by cell if C is in its shape, and in total otherwise.
    """

    name: str
    shape: str = ""

    def sizes(self, size_of: Mapping[str, int]) -> tuple[int, ...]:
        """Size of each axis, that of the experts first."""
        return tuple(size_of[letter] for letter in ("E", *self.shape.strip("[]").split()))


class Summed(Protocol):
    """What `Collector.finish` may use besides the sums of the collector."""

    @property
    def num_tokens(self) -> int:
        """Calibration tokens."""

    def through_w_down(self, activation_sum_ECF: Array) -> Array:
        """Sums of outputs, float64 [E, C, D], from un-routed activations summed by cell."""


class Collector:
    """One or several sums over tokens for every expert of a layer. It holds no state: sums are passed in.

    columns: of the evidence, and what they mean.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    @property
    def sums(self) -> tuple[Sum, ...]:
        """What is kept of a token shard: the columns themselves, unless `finish` makes them from something else."""
        return tuple(Sum(column.name, column.shape) for column in self.columns)

    def observe_router(self, sums: Sums, router: RouterView) -> None:
        """Add what the router says of a micro-batch."""

    def observe_unrouted(self, sums: Sums, unrouted: UnroutedView) -> None:
        """Add activations of experts that run on tokens whether they are routed to them or not."""

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Add routed pairs with their gates and outputs."""

    def add(self, one: Mapping[str, Array], other: Mapping[str, Array]) -> Mapping[str, Array]:
        """The sums over two successive token shards. What is no sum, such as a maximum, needs a method of its own."""
        return {name: values + other[name] for name, values in one.items()}

    def finish(self, sums: Mapping[str, Array], summed: Summed) -> Mapping[str, Array]:
        """The columns, from sums over all token shards."""
        return sums
