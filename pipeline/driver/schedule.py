"""Which unit a free slot runs next."""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.executors.base import Slot
from stages.contracts.units import Hold, Unit

_WORKER, _TASK = "worker", "task"


@dataclass
class _Group:
    """Ready units that share a hold (or have none), and how many are still to be finished.

    claimed_by: the worker that has opened the hold, or will open it next.
    """

    order: int
    hold: Hold | None = None
    ready: list[tuple[int, str]] = field(default_factory=list)
    num_unfinished: int = 0
    claimed_by: str | None = None


class Schedule:
    """Units of any number of runs, in order of their dependencies.

    A worker that has opened a hold keeps it until its units are done, so that each layer shard is loaded once. It gives a
    hold up only for an earlier one that nobody works on: all later ones wait for that. The hold that it will open next is
    chosen ahead (`ahead`), so that it can be read in the meantime; always one after its own, and a worker with nothing to do
    may take it first.
    """

    def __init__(self) -> None:
        self._units: dict[str, Unit] = {}
        self._order: dict[str, int] = {}
        self._next_order = 0
        self._makers: dict[str, str] = {}
        self._followers: dict[str, list[str]] = defaultdict(list)
        self._num_awaited: dict[str, int] = {}
        self._groups: dict[str, _Group] = {}
        self._claims: dict[str, str] = {}
        self._next: dict[str, str] = {}
        self._num_unfinished: dict[str, int] = defaultdict(int)
        self.alone: deque[Unit] = deque()
        """Units to be run with nothing beside them."""

    def add(self, units: Sequence[Unit]) -> None:
        """Add units of one run; what they follow is among them, or done."""
        for unit in units:
            self._units[unit.id] = unit
            self._order[unit.id] = self._next_order
            self._next_order += 1
            self._makers |= {f"{unit.run_dir}/{path}": unit.id for path in unit.writes}
        for unit in units:
            group = self._groups.setdefault(_group_key(unit), _Group(self._order[unit.id], unit.hold))
            group.num_unfinished += 1
            self._num_unfinished[unit.run_dir] += 1
            before = {self._makers.get(f"{unit.run_dir}/{path}") for path in unit.reads} | set(unit.after)
            awaited = [other for other in before if other is not None and other in self._units]
            self._num_awaited[unit.id] = len(awaited)
            for other in awaited:
                self._followers[other].append(unit.id)
            if not awaited:
                self._push(unit)

    def num_unfinished(self, run_dir: str) -> int:
        """Units of a run that are not done."""
        return self._num_unfinished[run_dir]

    def knows(self, unit: Unit) -> bool:
        """Whether a unit is to be finished: not done, and its run not dropped."""
        return unit.id in self._units

    def unfinished(self) -> Iterable[Unit]:
        """All units that are not done."""
        return self._units.values()

    def _push(self, unit: Unit) -> None:
        heapq.heappush(self._groups[_group_key(unit)].ready, (self._order[unit.id], unit.id))

    def _pop(self, key: str) -> Unit | None:
        group = self._groups.get(key)
        while group is not None and group.ready:
            unit = self._units.get(heapq.heappop(group.ready)[1])
            if unit is not None:  # else its run was dropped
                return unit
        return None

    def take(self, slot: Slot) -> Unit | None:
        """The next unit for a free slot, or None. A worker with nothing of its own to do helps with CPU units."""
        if not slot.is_worker:
            return self._pop(_TASK)
        unit = self._take_held(slot.id)
        if unit is None and slot.id not in self._claims:
            unit = self._pop(_WORKER)
        return unit or self._pop(_TASK)

    def _take_held(self, slot_id: str) -> Unit | None:
        own = self._claims.get(slot_id)
        if own is not None and self._groups[own].ready:
            return self._pop(own)
        free = [
            (group.order, key)
            for key, group in self._groups.items()
            if group.ready and group.hold is not None and self._is_free(key, slot_id)
        ]
        if not free or (own is not None and self._groups[own].order < min(free)[0]):
            return None
        self._claim(slot_id, min(free)[1])
        return self._pop(self._claims[slot_id])

    def _is_free(self, key: str, slot_id: str) -> bool:
        """Whether a worker may open a hold: nobody has it, or it is its own next, or the next of one that is not done yet."""
        other = self._groups[key].claimed_by
        return other is None or (self._next.get(other) == key and (other == slot_id or other in self._claims))

    def _claim(self, slot_id: str, key: str) -> None:
        ahead = self._next.get(slot_id)
        if ahead is not None and self._groups[ahead].order <= self._groups[key].order:
            self._release_next(slot_id)
        before = self._groups[key].claimed_by
        if before is not None:
            self._release_next(before)
        self._release_own(slot_id)
        self._claims[slot_id] = key
        self._groups[key].claimed_by = slot_id

    def ahead(self, slots: Iterable[Slot]) -> Iterator[tuple[Slot, Hold, bool]]:
        """The workers for which it has just been settled what they open next; the hold; whether they are done with theirs.

        A worker that is done claims the next at once, before any unit is ready, so as to have it open by then. The others
        get theirs in the order in which they will be done: that of what they hold.
        """
        for slot in sorted(slots, key=self._own_order):
            own = self._claims.get(slot.id)
            if own is None or slot.id not in self._next:
                key = self._next.get(slot.id) or self._first_free(slot.id)
                if key is not None:
                    yield slot, self._settle(slot.id, key), own is None

    def _own_order(self, slot: Slot) -> int:
        own = self._claims.get(slot.id)
        return -1 if own is None else self._groups[own].order

    def _first_free(self, slot_id: str) -> str | None:
        own = self._claims.get(slot_id)
        after = -1 if own is None else self._groups[own].order
        free = (
            (group.order, key)
            for key, group in self._groups.items()
            if group.hold is not None
            and group.order > after
            and (group.claimed_by is None or (own is None and self._is_free(key, slot_id)))
        )
        return min(free, default=(0, None))[1]

    def _settle(self, slot_id: str, key: str) -> Hold:
        group = self._groups[key]
        if slot_id in self._claims:
            self._next[slot_id], group.claimed_by = key, slot_id
        else:
            self._claim(slot_id, key)
        assert group.hold is not None
        return group.hold

    def release(self, slot_id: str) -> None:
        """Forget what a slot holds and is to hold: it is gone."""
        self._release_own(slot_id)
        self._release_next(slot_id)

    def _release_own(self, slot_id: str) -> None:
        key = self._claims.pop(slot_id, None)
        if key is not None:
            self._groups[key].claimed_by = None

    def _release_next(self, slot_id: str) -> None:
        key = self._next.pop(slot_id, None)
        if key is not None:
            self._groups[key].claimed_by = None

    def release_all(self) -> None:
        """All workers are gone."""
        for slot_id in {*self._claims, *self._next}:
            self.release(slot_id)

    def finish(self, unit: Unit) -> None:
        """A unit is sealed: its followers may become ready."""
        self._forget(unit)
        for follower in self._followers.pop(unit.id, ()):
            if follower in self._units:  # else its run was dropped
                self._num_awaited[follower] -= 1
                if not self._num_awaited[follower]:
                    self._push(self._units[follower])

    def _forget(self, unit: Unit) -> None:
        del self._units[unit.id], self._order[unit.id], self._num_awaited[unit.id]
        for path in unit.writes:
            del self._makers[f"{unit.run_dir}/{path}"]
        self._num_unfinished[unit.run_dir] -= 1
        key = _group_key(unit)
        group = self._groups[key]
        group.num_unfinished -= 1
        if not group.num_unfinished:
            for chosen in (self._claims, self._next):
                if group.claimed_by is not None and chosen.get(group.claimed_by) == key:
                    del chosen[group.claimed_by]
            del self._groups[key]

    def requeue(self, unit: Unit, alone: bool = False) -> None:
        """A unit whose worker is gone is ready again."""
        if alone:
            self.alone.append(unit)
        else:
            self._push(unit)

    def drop(self, run_dir: str, running: Iterable[Unit]) -> None:
        """Forget what a failed run has not started; what runs is finished as usual."""
        kept = {unit.id for unit in running}
        for unit in [unit for unit in self._units.values() if unit.run_dir == run_dir and unit.id not in kept]:
            self._forget(unit)
        self.alone = deque(unit for unit in self.alone if unit.id in self._units)


def _group_key(unit: Unit) -> str:
    if unit.hold is not None:
        return unit.hold.key
    return _WORKER if unit.on_worker else _TASK
