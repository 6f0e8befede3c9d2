"""Which unit a free slot runs next, and the loop that drives an executor until all are sealed or one has failed."""

import heapq
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.executors.base import Executor, Slot
from pipeline.manifest import read_manifest
from pipeline.units import Outcome, Unit

_WAIT_S = 1.0
_NO_SLOT_WARNING_S = 60.0


def producers(units: Sequence[Unit]) -> dict[str, str]:
    """Which unit writes each transient file."""
    return {path: unit.id for unit in units for path in unit.writes}


def select(run_dir: Path, units: Sequence[Unit], verify: bool) -> list[Unit]:
    """The units that must run, in order: those not sealed, and the makers of transient files that they lack.

    A maker of transient files that nobody lacks is left alone, sealed or not.
    """
    must_run: set[str] = set()
    lacking: set[str] = set()
    for unit in reversed(units):
        manifest = read_manifest(run_dir, unit)
        if unit.writes:
            written = manifest.transient if manifest else {}
            lost = [p for p in unit.writes if p in lacking and not (p in written and (run_dir / p).exists())]
            runs = bool(lost)
        else:
            runs = manifest is None or not manifest.is_whole(run_dir, verify)
        if runs:
            must_run.add(unit.id)
            lacking.update(unit.reads)
    return [unit for unit in units if unit.id in must_run]


def leftovers(units: Sequence[Unit], selected: Sequence[Unit]) -> set[str]:
    """Transient files that no unit will read again: a crash between a seal and the deletion may have left them."""
    chosen = {unit.id for unit in selected}
    wanted = {path for unit in selected for path in (*unit.reads, *unit.writes)}
    return {path for unit in units if unit.id not in chosen for path in unit.reads} - wanted


@dataclass
class _Group:
    """Ready units that share a hold (or none), and how many are still to be finished."""

    order: int
    ready: list[tuple[int, str]] = field(default_factory=list)
    unfinished: int = 0
    claimed_by: str | None = None


class Schedule:
    """Units in order of their dependencies.

    A worker that has opened a hold keeps it until its units are done, so that each layer shard is loaded once. It gives a
    hold up only for an earlier one that nobody works on: all later ones wait for that.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = {unit.id: unit for unit in units}
        self._order = {unit.id: number for number, unit in enumerate(units)}
        self._readers: dict[str, list[str]] = defaultdict(list)
        self._waiting: dict[str, int] = {}
        self._groups: dict[str, _Group] = {}
        self._claims: dict[str, str] = {}
        makers = producers(units)
        for unit in units:
            group = self._groups.setdefault(self._group_key(unit), _Group(self._order[unit.id]))
            group.unfinished += 1
            before = {makers[path] for path in unit.reads if path in makers} | {i for i in unit.after if i in self._units}
            self._waiting[unit.id] = len(before)
            for other in before:
                self._readers[other].append(unit.id)
            if not before:
                self._push(unit)
        self.num_unfinished = len(units)

    @staticmethod
    def _group_key(unit: Unit) -> str:
        if unit.hold is not None:
            return unit.hold.key
        return "worker" if unit.on_worker else "task"

    def _push(self, unit: Unit) -> None:
        heapq.heappush(self._groups[self._group_key(unit)].ready, (self._order[unit.id], unit.id))

    def _pop(self, key: str) -> Unit | None:
        group = self._groups.get(key)
        if group is None or not group.ready:
            return None
        return self._units[heapq.heappop(group.ready)[1]]

    def take(self, slot: Slot) -> Unit | None:
        """The next unit for a free slot, or None. A worker with nothing of its own to do helps with CPU units."""
        if not slot.is_worker:
            return self._pop("task")
        return self._take_held(slot.id) or self._pop("worker") or self._pop("task")

    def _take_held(self, slot_id: str) -> Unit | None:
        own = self._claims.get(slot_id)
        if own is not None and self._groups[own].ready:
            return self._pop(own)
        free = [
            (group.order, key)
            for key, group in self._groups.items()
            if group.ready and group.claimed_by is None and key not in ("worker", "task")
        ]
        if not free:
            return None
        order, key = min(free)
        if own is not None and self._groups[own].unfinished and self._groups[own].order < order:
            return None
        self.release(slot_id)
        self._claims[slot_id] = key
        self._groups[key].claimed_by = slot_id
        return self._pop(key)

    def release(self, slot_id: str) -> None:
        """Forget what a slot holds: it holds something else now, or is gone."""
        key = self._claims.pop(slot_id, None)
        if key is not None:
            self._groups[key].claimed_by = None

    def finish(self, unit: Unit) -> None:
        """A unit is sealed: its readers may become ready."""
        self.num_unfinished -= 1
        self._groups[self._group_key(unit)].unfinished -= 1
        for reader in self._readers[unit.id]:
            self._waiting[reader] -= 1
            if not self._waiting[reader]:
                self._push(self._units[reader])

    def requeue(self, unit: Unit) -> None:
        """A unit whose worker is gone is ready again."""
        self._push(unit)


@dataclass(frozen=True)
class UnitFailure:
    """A unit that did not finish, and how often it was tried."""

    unit: Unit
    outcome: Outcome
    attempts: int


def run_units(
    units: Sequence[Unit],
    executor: Executor,
    max_attempts: int,
    on_done: Callable[[Unit, Outcome], None],
    on_warning: Callable[[str], None],
) -> list[UnitFailure]:
    """Run units on an executor. Returns the failures; after the first, nothing new starts and what runs is let finish."""
    schedule = Schedule(units)
    executor.begin(units)
    attempts: dict[str, int] = defaultdict(int)
    failures: list[UnitFailure] = []
    idle_since = time.monotonic()
    while schedule.num_unfinished:
        if not failures:
            for slot in executor.free_slots():
                unit = schedule.take(slot)
                if unit is not None:
                    executor.submit(slot, unit)
        if not executor.num_running:
            if failures:
                break
            if time.monotonic() - idle_since > _NO_SLOT_WARNING_S:
                on_warning(executor.why_idle())
                idle_since = time.monotonic()
        else:
            idle_since = time.monotonic()
        for slot, unit, outcome in executor.wait(_WAIT_S):
            attempts[unit.id] += 1
            if outcome.failure is None:
                schedule.finish(unit)
                on_done(unit, outcome)
            elif outcome.failure.kind == "lost" and attempts[unit.id] < max_attempts:
                on_warning(f"{unit.stage} {unit.label}: {outcome.failure.message}; trying again on another worker")
                schedule.release(slot.id)
                schedule.requeue(unit)
            else:
                failures.append(UnitFailure(unit, outcome, attempts[unit.id]))
    return failures
