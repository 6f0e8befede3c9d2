"""Drives any number of runs on one executor: gives ready units to free slots, tries lost ones again, and knows when to stop."""

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.config import Resources
from pipeline.executors.base import Executor, Slot
from pipeline.run_state import RunState, UnitFailure
from pipeline.scheduler import Schedule
from pipeline.units import Failure, Outcome, Unit
from stages.common.errors import InputError

_WAIT_S = 1.0
_LOOK_S = 1.0
_SHORT_S = 0.1
_IDLE_WARNING_S = 60.0
_FIRST_TIMEOUT_S = 7200.0
_MIN_TIMEOUT_S = 600.0
_TIMEOUT_FACTOR = 20.0


@dataclass(frozen=True)
class _Running:
    unit: Unit
    since: float


class _Timeouts:
    """When a unit counts as hung: the setting, else 20 times the median of its kind, at least ten minutes; two hours for the
    first of its kind."""

    def __init__(self) -> None:
        self._elapsed: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=100))

    def note(self, unit: Unit, elapsed_s: float) -> None:
        self._elapsed[unit.call].append(elapsed_s)

    def is_short(self, unit: Unit) -> bool:
        """Whether units of this kind take so little that waiting behind some does not count."""
        known = self._elapsed[unit.call]
        return bool(known) and max(known) < _SHORT_S

    def limit_s(self, unit: Unit, resources: Resources) -> float:
        if resources.unit_timeout_s is not None:
            return resources.unit_timeout_s
        known = self._elapsed[unit.call]
        return max(_MIN_TIMEOUT_S, _TIMEOUT_FACTOR * statistics.median(known)) if known else _FIRST_TIMEOUT_S


class Driver:
    """One loop for all runs. A failed unit stops its own run: what runs is let finish and seal, nothing more is started."""

    def __init__(
        self,
        runs: Sequence[RunState],
        executor: Executor,
        warn: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs = {str(run.run_dir): run for run in runs}
        self._executor, self._warn, self._clock = executor, warn, clock
        self._schedule = Schedule()
        self._running: dict[str, _Running] = {}
        self._slots: dict[str, Slot] = {}
        self._attempts: dict[str, int] = defaultdict(int)
        self._timeouts = _Timeouts()
        self._alone: str | None = None
        self._tried_alone: set[str] = set()
        self._has_made_room = False
        self._idle_since = self._clock()
        self._looked_at = 0.0

    def drive(self) -> None:
        """Until every run is finished or has failed (see `RunState.failures`)."""
        while self._advance():
            self._assign()
            self._look_after()
            for slot, unit, outcome in self._executor.wait(_WAIT_S):
                self._ended(slot, unit, outcome)

    def _advance(self) -> bool:
        """Let each run with nothing left to do begin its next stage. False when all are over."""
        is_any_active = False
        for run_dir, run in self._runs.items():
            if run.is_active and not self._schedule.num_unfinished(run_dir):
                try:
                    self._schedule.add(run.advance())
                except InputError as e:
                    run.refuse(e)
                self._executor.want(list(self._schedule.unfinished()))
            is_any_active |= run.is_active or bool(self._schedule.num_unfinished(run_dir))
        return is_any_active

    def _assign(self) -> None:
        if self._alone is not None:
            return
        if self._schedule.alone:
            if not self._executor.num_running:
                self._assign_alone(self._schedule.alone[0])
            return
        idle = self._fill_slots()
        busy = [slot for slot in self._slots.values() if slot.is_worker]
        for slot, hold, is_free in self._schedule.ahead([*idle, *busy]):
            self._executor.open_ahead(slot, hold, is_free)

    def _fill_slots(self) -> list[Slot]:
        """Give free slots units; the workers for which there is none."""
        idle: list[Slot] = []
        for slot in self._executor.free_slots():
            taken = self._schedule.take(slot)
            if taken is not None and slot.is_queued and not self._timeouts.is_short(taken):
                self._schedule.requeue(taken)
                break
            if taken is not None:
                self._submit(slot, taken)
            elif slot.is_worker:
                idle.append(slot)
            else:
                break  # the slots that follow would find nothing either
        return idle

    def _assign_alone(self, unit: Unit) -> None:
        """Nothing runs: free all memory once, then give the unit to the first worker that is up again."""
        if not self._has_made_room:
            self._executor.make_room()
            self._schedule.release_all()
            self._has_made_room = True
        slots = [slot for slot in self._executor.free_slots() if slot.is_worker or not unit.on_worker]
        if slots:
            self._alone = self._schedule.alone.popleft().id
            self._tried_alone.add(unit.id)
            self._submit(slots[0], unit)

    def _submit(self, slot: Slot, unit: Unit) -> None:
        self._attempts[unit.id] += 1
        self._running[slot.id] = _Running(unit, self._clock())
        self._slots[slot.id] = slot
        self._runs[unit.run_dir].started(unit)
        self._executor.submit(slot, unit)

    def _look_after(self) -> None:
        """End what hangs; say what is missing when nothing can run."""
        now = self._clock()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        for slot_id, running in self._running.items():
            limit_s = self._timeouts.limit_s(running.unit, self._runs[running.unit.run_dir].config.resources)
            if now - running.since > limit_s:
                reason = f"no result after {limit_s:.0f} s (resources.unit_timeout_s sets the limit)"
                self._executor.cancel(self._slots[slot_id], reason)
        if self._executor.num_running:
            self._idle_since = now
        elif now - self._idle_since > _IDLE_WARNING_S:
            self._warn(self._executor.why_idle())
            self._idle_since = now

    def _ended(self, slot: Slot, unit: Unit, outcome: Outcome) -> None:
        del self._running[slot.id], self._slots[slot.id]
        if unit.id == self._alone:
            self._alone, self._has_made_room = None, False
        run = self._runs[unit.run_dir]
        failure = outcome.failure
        if failure is None:
            self._timeouts.note(unit, outcome.elapsed_s)
            self._schedule.finish(unit)
            self._attempts.pop(unit.id, None)
            run.done(unit, outcome)
            return
        if failure.kind == "node":
            self._attempts[unit.id] -= 1
        attempts = self._attempts[unit.id]
        if failure.kind in ("lost", "node", "memory"):
            self._schedule.release(slot.id)
        if run.is_active and self._may_retry(run, unit, failure, attempts):
            alone = failure.kind == "memory"
            run.retried(unit, outcome, "alone" if alone else "on another worker")
            self._schedule.requeue(unit, alone)
            return
        run.failed(UnitFailure(unit, outcome, max(1, attempts)))
        self._schedule.drop(unit.run_dir, [running.unit for running in self._running.values()])

    def _may_retry(self, run: RunState, unit: Unit, failure: Failure, attempts: int) -> bool:
        if failure.kind == "memory":
            return unit.id not in self._tried_alone
        return failure.kind == "node" or (failure.kind == "lost" and attempts < run.config.resources.max_attempts)
