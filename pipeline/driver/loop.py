"""Drives any number of runs on one executor: gives ready units to free slots, retries lost units, ends when all runs are
over."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.driver.interrupts import check_signals
from pipeline.driver.outcome import Failure, Outcome
from pipeline.driver.retry import how_again, pause_s
from pipeline.driver.run_state import RunState, UnitFailure
from pipeline.driver.schedule import Schedule
from pipeline.driver.timeouts import Timeouts
from pipeline.errors import LockLost
from pipeline.executors.base import Executor, Slot
from stages.contracts.errors import InputError
from stages.contracts.units import Unit

_WAIT_S = 1.0
_LOOK_S = 1.0
_IDLE_WARNING_S = 60.0


@dataclass
class _Running:
    """A running unit. since: when its worker began to open the hold; once the hold is open, when the unit itself began."""

    unit: Unit
    since: float
    is_opening: bool


class Driver:
    """One loop for all runs. When a unit fails for good, its run starts no more units, and its running units may finish and
    seal. When a run loses its lock, its running units are cancelled at once, and nothing more is written to its directory."""

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
        self._timeouts = Timeouts()
        self._paused: list[tuple[float, Unit]] = []
        self._alone: str | None = None
        self._tried_alone: set[str] = set()
        self._has_made_room = False
        self._idle_since = self._clock()
        self._looked_at = 0.0

    def drive(self) -> None:
        """Loop until every run has finished or failed. Afterwards `RunState.failures` lists the failed units.
        Raises KeyboardInterrupt once a signal has come."""
        while self._advance():
            check_signals()
            self._resume_paused()
            self._assign()
            self._look_after()
            for slot, unit, outcome in self._executor.wait(self._wait_s()):
                self._ended(slot, unit, outcome)

    @contextlib.contextmanager
    def _holding(self, run: RunState) -> Iterator[None]:
        """Run the body on behalf of a run that holds its lock.
        If the lock is lost, skip the rest of the body and stop the run."""
        try:
            yield
        except LockLost as e:
            run.lose(e)
            self._drop(str(run.run_dir), keep_running=False)
            for slot_id, running in self._running.items():
                if running.unit.run_dir == str(run.run_dir):
                    self._executor.cancel(self._slots[slot_id], "its run was stopped")

    def _drop(self, run_dir: str, keep_running: bool) -> None:
        running = [one.unit for one in self._running.values()]
        self._schedule.drop(run_dir, running if keep_running else [])
        self._paused = [(until, unit) for until, unit in self._paused if unit.run_dir != run_dir]
        if self._alone is not None and all(unit.id != self._alone for unit in running):  # it never started
            self._alone, self._has_made_room = None, False

    def _resume_paused(self) -> None:
        now = self._clock()
        for until, unit in self._paused:
            if until <= now:
                self._schedule.requeue(unit)
        self._paused = [(until, unit) for until, unit in self._paused if until > now]

    def _wait_s(self) -> float:
        """Seconds to wait for outcomes; no longer than until the end of the next pause."""
        if not self._paused:
            return _WAIT_S
        return min(_WAIT_S, max(0.0, min(until for until, _ in self._paused) - self._clock()))

    def _advance(self) -> bool:
        """Start every stage that may start. Returns False when all runs are over."""
        is_any_active = False
        for run_dir, run in self._runs.items():
            if run.is_active and run.can_advance:
                with self._holding(run):
                    try:
                        self._schedule.add(run.advance())
                    except InputError as e:
                        run.refuse(e)
                        self._drop(run_dir, keep_running=True)
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
        """Give units to free slots. Returns the workers that got none."""
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
                break  # the remaining slots are CPU tasks too, and no CPU unit is ready
        return idle

    def _assign_alone(self, unit: Unit) -> None:
        """Run a unit alone; nothing else runs now.
        Free all memory once, then give the unit to the first worker that is up again."""
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
        run = self._runs[unit.run_dir]
        with self._holding(run):
            run.started(unit, slot.id if slot.is_worker else "")
            self._attempts[unit.id] += 1
            self._executor.submit(slot, unit)
            is_opening = unit.hold is not None and self._executor.is_opening(slot)  # a CPU unit may have to wait, too
            self._running[slot.id] = _Running(unit, self._clock(), is_opening)
            self._slots[slot.id] = slot

    def _look_after(self) -> None:
        """Cancel hung units and units of runs whose lock is lost; warn when ready units find no slot."""
        now = self._clock()
        if now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        for run in self._runs.values():
            if run.is_active:
                with self._holding(run):
                    run.check_lock()
        for slot_id, running in self._running.items():
            if running.is_opening and not self._executor.is_opening(self._slots[slot_id]):
                running.is_opening, running.since = False, now
            limit_s, reason = self._limit(running)
            if now - running.since > limit_s:
                self._executor.cancel(self._slots[slot_id], reason)
        if self._executor.num_running or self._paused:
            self._idle_since = now
        elif now - self._idle_since > _IDLE_WARNING_S:
            self._warn(self._executor.why_idle())
            self._idle_since = now

    def _limit(self, running: _Running) -> tuple[float, str]:
        """Seconds until a running unit counts as hung, and the message for that case."""
        if running.is_opening:
            limit_s = self._timeouts.opening_s(running.unit)
            return limit_s, f"its layers were not loaded after {limit_s:.0f} s"
        limit_s = self._timeouts.unit_s(running.unit, self._runs[running.unit.run_dir].config.resources)
        return limit_s, f"no result after {limit_s:.0f} s (resources.unit_timeout_s sets the limit)"

    def _ended(self, slot: Slot, unit: Unit, outcome: Outcome) -> None:
        del self._running[slot.id], self._slots[slot.id]
        if unit.id == self._alone:
            self._alone, self._has_made_room = None, False
        run = self._runs[unit.run_dir]
        failure = outcome.failure
        if failure is not None and failure.kind in ("lost", "node", "memory", "passing"):
            self._schedule.release(slot.id)
        if not self._schedule.knows(unit):  # the unit's run has lost its lock
            return
        with self._holding(run):
            if failure is None:
                self._timeouts.note(unit, outcome)
                self._schedule.finish(unit)
                self._attempts.pop(unit.id, None)
                run.done(unit, outcome)
            else:
                self._failed(run, unit, outcome, failure)

    def _failed(self, run: RunState, unit: Unit, outcome: Outcome, failure: Failure) -> None:
        """Retry a unit, or fail its run."""
        if failure.kind == "node":
            self._attempts[unit.id] -= 1
        attempts, max_attempts = self._attempts[unit.id], run.config.resources.max_attempts
        if not run.is_active or not self._may_retry(unit, failure, attempts, max_attempts):
            run.failed(UnitFailure(unit, outcome, max(1, attempts)))
            self._drop(unit.run_dir, keep_running=True)
        elif failure.kind == "memory":
            run.retried(unit, outcome, "alone")
            self._schedule.requeue(unit, alone=True)
        elif failure.kind == "passing":
            run.retried(unit, outcome, how_again(attempts, max_attempts))
            self._paused.append((self._clock() + pause_s(attempts), unit))
        else:
            run.retried(unit, outcome, "on another worker")
            self._schedule.requeue(unit)

    def _may_retry(self, unit: Unit, failure: Failure, attempts: int, max_attempts: int) -> bool:
        if failure.kind == "memory":
            return unit.id not in self._tried_alone
        return failure.kind == "node" or (failure.kind in ("lost", "passing") and attempts < max_attempts)
