"""Methods: pure functions from a layer's evidence to its layer plan, with what a run has to know of them. No torch.

A method is one file in `stages/cluster/methods` that holds a `METHOD`, and one line in `stages/cluster/registry.py`.

Dimensions: E experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from pydantic import JsonValue

from stages.contracts.arrow import Array
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.settings import Clustering, Merging

S = TypeVar("S", bound=Clustering)

PairCost = Literal["elimination", "importance", "auto"]
"""By what pairs of experts are compared. importance: the importance of the neurons that find no room. elimination: the error of
the layer's output that is left once a slot's neurons are chosen and what they feed is solved. auto: elimination where a layer's
pairs, compared by all neurons, take at most 1e15 floating-point operations, else importance."""

Preset = Mapping[str, Mapping[str, JsonValue]]
"""Settings by section: clustering, budget, merging, refit, export."""


@dataclass(frozen=True)
class PlanSettings(Generic[S]):
    """What a method is asked for, beside the number of slots.

    clustering: its own settings. merging: how weights are made of evidence. router: how a stock router's rows are combined;
    None for a tied export, whose router stays as it is. num_groups: groups of equally many experts, in order, that the router
    first chooses from, where slots have to stay in them: of a stock export, for a method with `reads_groups`. protected:
    experts that must stay as they are; always empty for a method that does not declare `keeps_protected`.
    """

    clustering: S
    merging: Merging
    router: str | None
    num_groups: int = 1
    protected: tuple[int, ...] = ()


@dataclass(frozen=True)
class Method(Generic[S]):
    """A method.

    name: value of `clustering.method`. title: what people call it. source: where it was published, such as arXiv:2410.08589.
    limits: what it cannot do, in a sentence.
    settings: its section `clustering`. plan: given the evidence of a layer and the number of slots; a pure function.
    requires: given its settings, columns of evidence that it reads beyond those of every run. formats: that can express its
    plans.
    keeps_protected: whether it reads `PlanSettings.protected`; any other method is given the evidence of the other experts
    alone. predicts_routing: whether it predicts what the router picks among fewer experts, which not all families allow.
    reads_merging: whether it reads the section `merging`. reads_groups: whether it keeps slots within groups of a stock
    router. keeps_all: every expert is a slot, and a target's number of experts says how wide they are: as many parameters as so
    many experts have. needs_choice: its slots only list whose neurons are to be chosen from (`refit.neurons: choose`).
    pair_cost: given its settings, by what recombine compares pairs; importance leaves the method's own. alternatives: further
    plans by name, each in the formats that it names, of which recombine takes the best in every layer. linkage: the dendrogram
    that its plans are cuts of, as scipy's matrix [E-1, 4], where there is one. presets: named settings for variants.
    """

    name: str
    title: str
    source: str
    limits: str
    settings: type[S]
    plan: Callable[[LayerEvidence, int, PlanSettings[S]], LayerPlan]
    requires: Callable[[S], frozenset[str]] = lambda settings: frozenset()
    formats: tuple[str, ...] = ("tied", "stock")
    reads_merging: bool = True
    reads_groups: bool = False
    keeps_all: bool = False
    needs_choice: bool = False
    keeps_protected: bool = False
    predicts_routing: bool = False
    pair_cost: Callable[[S], PairCost] = lambda settings: "importance"
    alternatives: Mapping[str, "Alternative"] = field(default_factory=dict)
    linkage: Callable[[LayerEvidence, S], Array] | None = None
    presets: Mapping[str, Preset] = field(default_factory=dict)

    def alternatives_in(self, export_format: str) -> tuple[str, ...]:
        """Names of the alternatives that a format can express, in order."""
        return tuple(name for name, one in self.alternatives.items() if export_format in one.formats)


@dataclass(frozen=True)
class Alternative:
    """Another plan of a method, as `Method.plan` makes it, and the formats that can express it."""

    plan: Callable[[LayerEvidence, int, PlanSettings[Any]], LayerPlan]
    formats: tuple[str, ...] = ("tied", "stock")


Methods = Mapping[str, Method[Any]]
"""By name; each has settings of a class of its own."""
