"""Layer plan: what becomes of one MoE layer's experts, whatever the method. Merge reads nothing else of a method.

Dimensions: E experts of the source, F neurons of an expert (its intermediate size).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, read_table, write_table
from stages.io.files import WrittenFile

DROPPED = -1
"""In `LayerPlan.slot_E`: the router can no longer send a token to this expert."""


@dataclass(frozen=True)
class Member:
    """What a slot takes from one expert of the source.

    weight: factor of its values in a sum. neurons: which of its neurons, and in which order; None for all F in their own.
    places: instead of `neurons`, the place in the slot of each of its F neurons. Neurons that share a place, of one member or
    of several, are averaged there, by the weights of their members.
    """

    expert: int
    weight: float = 1.0
    neurons: tuple[int, ...] | None = None
    places: tuple[int, ...] | None = None


def neuron_places(neurons: Sequence[int] | None, num_places: int, order: str) -> list[Array]:
    """Indices of neurons along the axis that holds them. Raises ValueError for a neuron that is not there.

    neurons: None for all. num_places: size of the axis. order: as in `TensorRow.neuron_order`. One list of indices; two, of
    gates and of ups, where all gates come first.
    """
    num_neurons = num_places if order == "single" else num_places // 2
    chosen_F = np.arange(num_neurons) if neurons is None else np.asarray(neurons, dtype=np.int64)
    outside_F = chosen_F[(chosen_F < 0) | (chosen_F >= num_neurons)]
    if len(outside_F):
        raise ValueError(f"the layer plan names neuron {outside_F[0]} of {num_neurons}; mend the method that made the plan")
    if order == "halves":
        return [chosen_F, chosen_F + num_neurons]
    if order == "interleaved":
        return [np.stack([2 * chosen_F, 2 * chosen_F + 1], axis=1).reshape(-1)]
    return [chosen_F]


@dataclass(frozen=True)
class RouterRow:
    """A row of a stock router: the sum of weight * row over rows of the source's router, (expert, weight)."""

    parts: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Slot:
    """One expert of the result.

    experts: experts of the source whose tokens it gets. members: what it is made of.
    is_joined: the members' neurons stand one after another, instead of being added up. Values that belong to no neuron, such as
    the bias of W_down, are added up in either case.
    row: of a stock router; None in a tied plan, whose router stays as it is.
    is_unweighted: no calibration token was sent to its members, so their weights say nothing about use.
    """

    experts: tuple[int, ...]
    members: tuple[Member, ...]
    is_joined: bool = False
    row: RouterRow | None = None
    is_unweighted: bool = False


def pooled_places(slot: Slot, num_places: int, order: str) -> list[tuple[Array, Array]]:
    """For each member of a slot whose members have `places`: where each index along the axis of neurons goes, and its share
    there, float64. The shares of what comes to one place add up to one. num_places, order: as in `neuron_places`.

    Raises ValueError where the places are not those of all the neurons.
    """
    given = [member.places for member in slot.members if member.places is not None]
    num_neurons = num_places if order == "single" else num_places // 2
    if {len(places) for places in given} != {num_neurons} or max(map(max, given)) + 1 != num_neurons:
        raise ValueError(
            f"the layer plan fills {max(map(max, given)) + 1} of {num_neurons} places of neurons; mend the "
            f"method that made the plan"
        )
    weights = np.repeat([member.weight for member in slot.members], num_neurons)
    share_MF = (weights / np.bincount(np.concatenate(given), weights)[np.concatenate(given)]).reshape(len(given), -1)
    lists = [neuron_places(places, num_places, order) for places in given]
    return [
        (np.concatenate(some), np.tile(np.repeat(share_F, len(some[0]) // num_neurons), len(some)))
        for some, share_F in zip(lists, share_MF, strict=True)
    ]


@dataclass(frozen=True)
class LayerPlan:
    """Slots of one MoE layer, in the order of the result's experts.

    num_experts: E. replaced: parameters of the model, by their name in transformers, whose values are solved ones instead of
    the members'; they lie in the file `stages.contracts.paths.replaced_file` beside the plan, the slots along their first axis;
    or those of a shared expert.

    Raises ValueError for a plan that no checkpoint can express; the message says what a method has to return.
    """

    layer: int
    num_experts: int
    slots: tuple[Slot, ...]
    replaced: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for number, slot in enumerate(self.slots):
            problem = _problem(slot, self.num_experts)
            if problem:
                raise ValueError(
                    f"layer plan of layer {self.layer}: slot {number} {problem}; mend the method that made the plan"
                )
        sent = [expert for slot in self.slots for expert in slot.experts]
        if len(sent) != len(set(sent)):
            raise ValueError(
                f"layer plan of layer {self.layer}: an expert belongs to two slots; each has at most one; mend "
                f"the method that made the plan"
            )
        if not self.slots or len({slot.row is None for slot in self.slots}) > 1:
            raise ValueError(
                f"layer plan of layer {self.layer}: it needs slots, and a router row in all of them or in "
                f"none; mend the method that made the plan"
            )

    @property
    def slot_E(self) -> Array:
        """Slot int32 [E] of every expert of the source, or DROPPED."""
        slot_E = np.full(self.num_experts, DROPPED, dtype=np.int32)
        for number, slot in enumerate(self.slots):
            slot_E[list(slot.experts)] = number
        return slot_E

    @property
    def unweighted_slots(self) -> tuple[int, ...]:
        """Slots whose members no calibration token was sent to."""
        return tuple(number for number, slot in enumerate(self.slots) if slot.is_unweighted)


def _problem(slot: Slot, num_experts: int) -> str:
    """What is wrong with a slot, or nothing."""
    rows = slot.row.parts if slot.row is not None else ((0, 1.0),)
    named = (*slot.experts, *(member.expert for member in slot.members), *(expert for expert, _ in rows))
    if not slot.members or not rows:
        return "has no members or an empty router row; name at least one expert of the source"
    if not all(0 <= expert < num_experts for expert in named):
        return f"names expert {max(named)}; the source has experts 0 to {num_experts - 1}"
    if not all(math.isfinite(weight) for weight in (*(member.weight for member in slot.members), *(w for _, w in rows))):
        return "has a weight that is not finite"
    counts = {len(member.neurons) for member in slot.members if member.neurons is not None}
    if not slot.is_joined and len(counts) > 1:
        return "adds up members with different numbers of neurons; give all of them the same number"
    return _problem_of_places(slot)


def _problem_of_places(slot: Slot) -> str:
    """What is wrong with the places of a slot's neurons, or nothing."""
    given = [member.places for member in slot.members if member.places is not None]
    if not given:
        return ""
    if slot.is_joined or len(given) < len(slot.members) or any(member.neurons is not None for member in slot.members):
        return "has places for some members only, or beside chosen or joined neurons; give places to all members, and no more"
    if min(member.weight for member in slot.members) <= 0:
        return "averages neurons by weights that are not positive"
    named = {place for places in given for place in places}
    if named != set(range(len(named))):
        return f"leaves a place of its neurons empty; fill all from 0 to {max(named)}"
    return ""


_PART = pa.struct([pa.field("expert", pa.int32(), False), pa.field("weight", pa.float64(), False)])
_MEMBER = pa.struct([*_PART, pa.field("neurons", pa.list_(pa.int32()))])
_MEANINGS = {
    "table": "layer plan: one slot (expert of the result) a row, in order",
    "experts": "experts of the source whose tokens the slot gets; an expert in no list is dropped",
    "members": "experts of the source that the slot is made of, with weights; neurons: which and in which order, null for all",
    "is_joined": "the members' neurons stand one after another instead of being added up",
    "row": "rows of the source's router that are added up to the slot's, with weights; null where the router stays as it is",
    "is_unweighted": "no calibration token was sent to the members",
}
_SCHEMA = pa.schema(
    [
        pa.field("experts", pa.list_(pa.int32()), False),
        pa.field("members", pa.list_(_MEMBER), False),
        pa.field("is_joined", pa.bool_(), False),
        pa.field("row", pa.list_(_PART)),
        pa.field("is_unweighted", pa.bool_(), False),
    ],
    metadata=_MEANINGS,
)
_PLACES = "places"
_PLACES_TYPE = pa.list_(pa.list_(pa.int32()))
_PLACES_MEANING = "by member, the place in the slot of each of its neurons; those that share one are averaged; null: in order"
"""A column of its own, only in files of plans that have places."""


def write_plan(path: Path, plan: LayerPlan) -> WrittenFile:
    """Write the plan of one layer."""
    columns = {
        "experts": [slot.experts for slot in plan.slots],
        "members": [[_member_values(member) for member in slot.members] for slot in plan.slots],
        "is_joined": [slot.is_joined for slot in plan.slots],
        "row": [_row_values(slot.row) for slot in plan.slots],
        "is_unweighted": [slot.is_unweighted for slot in plan.slots],
    }
    facts = {"layer": str(plan.layer), "num_experts": str(plan.num_experts), "replaced": json.dumps(plan.replaced)}
    schema, meanings = _SCHEMA, _MEANINGS
    if any(member.places is not None for slot in plan.slots for member in slot.members):
        columns[_PLACES] = [[member.places for member in slot.members] for slot in plan.slots]
        schema, meanings = schema.append(pa.field(_PLACES, _PLACES_TYPE, False)), {**meanings, _PLACES: _PLACES_MEANING}
    return write_table(path, columns, schema.with_metadata({**meanings, **facts}))


def _member_values(member: Member) -> dict[str, object]:
    return {"expert": member.expert, "weight": member.weight, "neurons": member.neurons}


def _row_values(row: RouterRow | None) -> list[dict[str, float]] | None:
    return None if row is None else [{"expert": expert, "weight": weight} for expert, weight in row.parts]


def read_plan(path: Path) -> LayerPlan:
    """Read the plan of one layer."""
    table = read_table(path)
    facts = {name: table.schema.metadata[name.encode()].decode() for name in ("layer", "num_experts", "replaced")}
    slots = tuple(
        Slot(
            tuple(row["experts"]),
            tuple(
                Member(one["expert"], one["weight"], _as_tuple(one["neurons"]), _as_tuple(places))
                for one, places in zip(row["members"], row.get(_PLACES) or [None] * len(row["members"]), strict=True)
            ),
            row["is_joined"],
            None if row["row"] is None else RouterRow(tuple((part["expert"], part["weight"]) for part in row["row"])),
            row["is_unweighted"],
        )
        for row in table.to_pylist()
    )
    return LayerPlan(int(facts["layer"]), int(facts["num_experts"]), slots, tuple(json.loads(facts["replaced"])))


def _as_tuple(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)
