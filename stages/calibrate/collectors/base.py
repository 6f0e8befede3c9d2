"""Base class of collectors. Neither this module nor a collector imports torch, because the driver reads their declarations.

Dimensions: C cells, D hidden size, E experts, F intermediate size, N tokens of a token shard that a collector keeps one
by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from stages.contracts.evidence import Column

if TYPE_CHECKING:
    from torch import Tensor

    from stages.calibrate.observations import InputView, KeptView, RoutedView, RouterView, UnroutedView
    from stages.contracts.arrow import Array

Sums = Mapping[str, "Tensor"]
"""Sums of one collector over one token shard, by name. Their first axis is the experts."""


@dataclass(frozen=True)
class Sum:
    """A sum that a collector keeps for each expert. shape: axes of one expert's part, as letters of the legend above in
    brackets.

    A sum with C in its shape is kept separately for each cell, one with N for each of those tokens, any other in total.
    """

    name: str
    shape: str = ""

    def sizes(self, size_of: Mapping[str, int]) -> tuple[int, ...]:
        """Size of each axis. The first axis is the experts."""
        return tuple(size_of[letter] for letter in ("E", *self.shape.strip("[]").split()))


@dataclass(frozen=True)
class Kept:
    """Tokens that a collector keeps one by one in a layer, and what it keeps of each.

    most: tokens of the calibration set at most. num_values: values that are kept of each token, of all experts. itemsize: bytes
    of such a value in the evidence. what: the values in words, for `plan`.
    """

    most: int
    num_values: int
    itemsize: int
    what: str


class Summed(Protocol):
    """Data that `Collector.finish` may use besides the collector's own sums."""

    @property
    def num_tokens(self) -> int:
        """Number of calibration tokens."""

    def through_w_down(self, activation_sum_ECF: Array) -> Array:
        """Sums of outputs, float64 [E, C, D], from un-routed activations summed by cell."""

    def down_square_norms(self) -> Array:
        """Squared norms of the columns of W_down, float64 [E, F]."""

    def weight_gram(self) -> Array:
        """Inner products of all weights of the experts, float64 [E, E]."""


class Collector:
    """One or several sums over tokens for every expert of a layer. A collector has no state: sums are passed in.

    columns: the evidence columns that it computes, with their meaning.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    @property
    def sums(self) -> tuple[Sum, ...]:
        """Sums kept for a token shard: by default the columns themselves.
        A collector that overrides `finish` may keep other sums."""
        return tuple(Sum(column.name, column.shape) for column in self.columns)

    def keeps(self, num_experts: int, num_neurons: int) -> Kept | None:
        """What it keeps token by token of a layer with so many experts of so many neurons; None if it keeps sums alone."""
        return None

    def observe_input(self, sums: Sums, view: InputView) -> None:
        """Run experts on the tokens that un-routed sums cover. What that costs comes on top of the forward."""

    def observe_router(self, sums: Sums, router: RouterView) -> None:
        """Add the router's output for a micro-batch."""

    def observe_unrouted(self, sums: Sums, unrouted: UnroutedView) -> None:
        """Add activations of experts that run on given tokens, routed to them or not."""

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        """Add routed pairs with their gates and outputs."""

    def observe_kept(self, sums: Sums, kept: KeptView) -> None:
        """Fill in the tokens that the collector keeps, if any."""

    def add(self, one: Mapping[str, Array], other: Mapping[str, Array]) -> Mapping[str, Array]:
        """Combine sums over two successive token shards.
        A collector that keeps something else, such as a maximum, must override this."""
        return {name: values + other[name] for name, values in one.items()}

    def finish(self, sums: Mapping[str, Array], summed: Summed) -> Mapping[str, Array]:
        """The columns, computed from the sums over all token shards."""
        return sums
