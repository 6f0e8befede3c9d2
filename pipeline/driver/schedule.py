"""Decides which unit a free slot runs next."""

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.executors.base import Slot
from stages.contracts.units import Hold, Unit

_WORKER, _TASK = "worker", "task"


@dataclass
class _Group:
    """The unfinished units that share a hold, or those without a hold. ready: units that can start now.

    claimed_by: the worker that has opened the hold, or will open it next.
    """

    order: int
    hold: Hold | None = None
    ready: list[tuple[int, str]] = field(default_factory=list)
    num_unfinished: int = 0
    claimed_by: str | None = None


class Schedule:
    """Units of any number of runs, in order of their dependencies.

    A worker keeps an opened hold until all its units are done, so that each layer shard is loaded once. It switches only to an
    earlier hold that no worker has, because all later holds wait for the earlier one. The next hold of a busy worker is chosen
    in advance (`ahead`), so that its files can be read meanwhile. It always comes later than the current hold, and an idle
    worker may take it over.
    """

    def __init__(self) -> None:
        self._units: dict[str, Unit] = {}
        self._order: dict[str, int] = {}
        self._next_order = 0
        self._makers: dict[str, str] = {}
        self._followers: dict[str, list[str]] = defaultdict(list)
        self._num_awaited: dict[str, int] = {}
        self._groups: dict[str, _Group] = {}
        """In order of their first units."""
        self._ready: set[str] = set()
        """Keys of groups with a hold that have ready units."""
        self._claims: dict[str, str] = {}
        self._next: dict[str, str] = {}
        self._num_unfinished: dict[str, int] = defaultdict(int)
        self.alone: deque[Unit] = deque()
        """Units that must run while nothing else does."""

    def add(self, units: Sequence[Unit]) -> None:
        """Add units of one run. The units that they wait for must be among them or be done."""
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
        """Number of units of a run that are not done."""
        return self._num_unfinished[run_dir]

    def knows(self, unit: Unit) -> bool:
        """Whether a unit still has to be finished: it is not done, and its run was not dropped."""
        return unit.id in self._units

    def unfinished(self) -> Iterable[Unit]:
        """All units that are not done."""
        return self._units.values()

    def _push(self, unit: Unit) -> None:
        heapq.heappush(self._groups[_group_key(unit)].ready, (self._order[unit.id], unit.id))
        if unit.hold is not None:
            self._ready.add(unit.hold.key)

    def _pop(self, key: str) -> Unit | None:
        group = self._groups.get(key)
        while group is not None and group.ready:
            unit = self._units.get(heapq.heappop(group.ready)[1])
            if not group.ready:
                self._ready.discard(key)
            if unit is not None:  # else its run was dropped
                return unit
        return None

    def take(self, slot: Slot) -> Unit | None:
        """The next unit for a free slot, or None. A worker without a unit of its own takes a CPU unit."""
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
        free = [(self._groups[key].order, key) for key in self._ready if self._is_free(key, slot_id)]
        if not free or (own is not None and self._groups[own].order < min(free)[0]):
            return None
        self._claim(slot_id, min(free)[1])
        return self._pop(self._claims[slot_id])

    def _is_free(self, key: str, slot_id: str) -> bool:
        """Whether a worker may open a hold: it is unclaimed, or it is the next hold of this worker or of a busy one."""
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
        """Choose next holds for workers. Yields each worker with a new choice, its next hold, and whether it is free to open it
        now.

        A free worker claims its next hold at once, before any of its units is ready, so that the hold is open by then. Busy
        workers choose in the order of their current holds, which is the order in which they become free.
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
        return next(
            (
                key
                for key, group in self._groups.items()
                if group.hold is not None
                and group.order > after
                and (group.claimed_by is None or (own is None and self._is_free(key, slot_id)))
            ),
            None,
        )

    def _settle(self, slot_id: str, key: str) -> Hold:
        group = self._groups[key]
        if slot_id in self._claims:
            self._next[slot_id], group.claimed_by = key, slot_id
        else:
            self._claim(slot_id, key)
        assert group.hold is not None
        return group.hold

    def release(self, slot_id: str) -> None:
        """Forget the current and the next hold of a slot that is gone."""
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
        """Forget the holds of all workers, because all workers are gone."""
        for slot_id in {*self._claims, *self._next}:
            self.release(slot_id)

    def finish(self, unit: Unit) -> None:
        """Mark a unit as sealed. Units that waited for it may become ready."""
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
            self._ready.discard(key)

    def requeue(self, unit: Unit, alone: bool = False) -> None:
        """Make a unit ready again whose worker is gone. alone: it must run while nothing else does."""
        if alone:
            self.alone.append(unit)
        else:
            self._push(unit)

    def drop(self, run_dir: str, running: Iterable[Unit]) -> None:
        """Forget the units of a failed run, except the running ones, which finish as usual."""
        kept = {unit.id for unit in running}
        for unit in [unit for unit in self._units.values() if unit.run_dir == run_dir and unit.id not in kept]:
            self._forget(unit)
        self.alone = deque(unit for unit in self.alone if unit.id in self._units)


def _group_key(unit: Unit) -> str:
    if unit.hold is not None:
        return unit.hold.key
    return _WORKER if unit.on_worker else _TASK
