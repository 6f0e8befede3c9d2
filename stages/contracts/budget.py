"""Budgets: how many experts each layer keeps, where `clustering.num_experts` is the mean. No torch.

A kind is one file in `stages/cluster/budgets` that holds a `BUDGET`, and one line in the registry there.

Dimensions: L MoE layers, N numbers of experts that a layer may keep.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.contracts.arrow import Array, read_table, write_table
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import LayerPlan
from stages.contracts.method import Method, PlanSettings
from stages.io.files import WrittenFile

BUDGET_UNIT = "budget"
"""Name of the unit that decides a target's budget."""


@dataclass(frozen=True)
class Planner:
    """A layer for which a kind of budget says what numbers of experts cost.

    settings: of the method, with the protected experts. plan: the method's plan for a number of experts, protection included.
    """

    evidence: LayerEvidence
    method: Method[Any]
    settings: PlanSettings[Any]
    plan: Callable[[int], LayerPlan]


@dataclass(frozen=True)
class BudgetKind:
    """A kind of budget.

    name: value of `budget.kind`. title, source, limits: as of a method. costs: what it costs a layer to keep so many experts,
    float64 [N], for each of some numbers; comparable between layers, and the budget makes their sum over all layers as small as
    can be. None where every layer keeps the same number. requires: columns of evidence that it reads beyond those of every run.
    needs_linkage: whether the method must have a dendrogram. adds_outputs: whether the layer must add its experts' outputs
    times their gates.
    """

    name: str
    title: str
    source: str
    limits: str
    costs: Callable[[Planner, Sequence[int]], Array] | None = None
    requires: frozenset[str] = frozenset()
    needs_linkage: bool = False
    adds_outputs: bool = False


BudgetKinds = Mapping[str, BudgetKind]
"""By name."""


@dataclass(frozen=True)
class BudgetFacts:
    """layers: MoE layers, ascending. num_slots: experts that each of them keeps."""

    layers: tuple[int, ...]
    num_slots: tuple[int, ...]


@dataclass(frozen=True)
class LayerCosts:
    """num_slots: numbers of experts that a layer may keep, ascending. costs_N: what each of them costs."""

    num_slots: tuple[int, ...]
    costs_N: Array


_COSTS = pa.schema(
    [pa.field("num_experts", pa.int32(), False), pa.field("cost", pa.float64(), False)],
    metadata={"table": "a number of experts that the layer may keep a row", "cost": "in the units of the kind of budget"},
)
_BUDGET = pa.schema(
    [pa.field("layer", pa.int32(), False), pa.field("num_experts", pa.int32(), False)],
    metadata={"table": "a MoE layer a row", "num_experts": "experts that it keeps"},
)


def write_costs(path: Path, found: LayerCosts) -> WrittenFile:
    """Write what each number of experts costs a layer."""
    return write_table(path, {"num_experts": found.num_slots, "cost": found.costs_N}, _COSTS)


def read_costs(path: Path) -> LayerCosts:
    """Read a file of `write_costs`."""
    table = read_table(path)
    return LayerCosts(tuple(table["num_experts"].to_pylist()), table["cost"].to_numpy())


def write_budget(path: Path, facts: BudgetFacts) -> WrittenFile:
    """Write how many experts each layer keeps."""
    return write_table(path, {"layer": facts.layers, "num_experts": facts.num_slots}, _BUDGET)


def read_budget(path: Path) -> dict[int, int]:
    """Experts that each layer keeps, by layer."""
    table = read_table(path)
    return dict(zip(table["layer"].to_pylist(), table["num_experts"].to_pylist(), strict=True))
