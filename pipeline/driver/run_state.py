"""State of one run: hands out its units, records their outcomes, publishes its results."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich import filesize

from pipeline.checks import Checked
from pipeline.display.progress import Reporter
from pipeline.driver.outcome import Outcome
from pipeline.driver.retry import persist
from pipeline.driver.selection import delete, leftovers, select, sweep
from pipeline.errors import LockLost, RunFailed
from pipeline.run.owned import IDENTITY_FILE, recorded_key
from pipeline.run.publish import publish
from pipeline.run.record import write_record
from pipeline.run.run_dir import check_run_dir
from pipeline.run.view import RunView
from pipeline.state import logs
from pipeline.state.events import EventLog
from pipeline.state.manifest import MANIFESTS_DIR
from stages.contracts.errors import InputError
from stages.contracts.events import (
    FAILED,
    LOST,
    RUN_BEGINS,
    RUN_ENDS,
    SEALED,
    STAGE_BEGINS,
    STARTED,
    Event,
    kind_of,
    now,
)
from stages.contracts.paths import REPORT_FILE, TRANSIENT_DIRS
from stages.contracts.spec import StageSpec
from stages.contracts.units import Unit, failure_in
from stages.io.files import write_json
from stages.io.storage import failures

T = TypeVar("T")


@dataclass(frozen=True)
class UnitFailure:
    """A unit that failed for good, its outcome, and how often it was tried."""

    unit: Unit
    outcome: Outcome
    attempts: int


@dataclass(frozen=True)
class RunOptions:
    """Options of one invocation.

    verify: compare the digests of finished files. from_stage: redo this stage and all later ones. only_stage: run only this
    stage. command: the command line, for the record.
    """

    verify: bool = False
    from_stage: str | None = None
    only_stage: str | None = None
    command: str = ""


@dataclass(frozen=True)
class RunResult:
    """Result of a run: the parsed report (without models if none was written) and the number of units that ran. shortfalls:
    what is lacking, a line for each unit that was sealed with a failure; if there is any, the run has not succeeded."""

    report: Mapping[str, Any]
    report_path: Path
    num_run: int
    num_reused: int
    elapsed_s: float
    shortfalls: tuple[str, ...] = ()


class RunState:
    """A run in progress.

    A stage begins once all stages that it waits for have finished; several stages may run at the same time. Raises InputError
    or RunFailed when the run cannot work in its run directory.
    """

    def __init__(self, checked: Checked, reporter: Reporter, options: RunOptions) -> None:
        self.config, self.options, self._reporter, self._inputs = checked.config, options, reporter, checked.inputs
        self._view = RunView(self.config, checked.inputs)
        self.run_dir = self._view.run_dir
        check_run_dir(self._view)
        for line in checked.remarks:
            reporter.line(line)
        for dataset in checked.datasets.values():
            if dataset.note:
                reporter.line(dataset.note)
        self.failures: list[UnitFailure] = []
        self._refusal: InputError | LockLost | None = None
        self.is_active = True
        self.can_advance = True
        """Whether a stage may begin. If True, the driver must call `advance`."""
        self._waiting = list(self._view.specs)
        self._running: Counter[str] = Counter()
        self._ended: list[StageSpec] = []
        self._finished: set[str] = set()
        self._num_readers: Counter[str] = Counter()
        """Units that are still to read each transient file."""
        self._is_reported = False
        self._started = time.monotonic()
        self._events: EventLog | None = None
        self._check: Callable[[], None] | None = None
        self._num_run = self._num_reused = 0
        self._shortfalls: list[str] = []

    def begin(self, num_workers: int, check_lock: Callable[[], None]) -> None:
        """Begin the run once the lock is held and the executor is up: record its settings and remove files that killed workers
        left.

        check_lock: raises LockLost when another driver holds the lock. It is called before every change to the run directory,
        so this method and all later ones may raise LockLost, except `close` and `result`.
        """
        self._started = time.monotonic()
        self._check = check_lock
        self._view = RunView(self.config, self._inputs, num_workers)
        self._waiting = list(self._view.specs)
        self._events = EventLog(self.run_dir, check_lock)
        self._persist(self._record)
        names = [spec.name for spec in self._view.specs]
        self._write(Event(time=now(), event=RUN_BEGINS, num_workers=num_workers, stages=names, command=self.options.command))

    def _record(self) -> None:
        self.check_lock()
        parts = self._view.all_parts()
        sweep(self.run_dir, [part.dir for part in parts])
        for part in parts:
            folder = self.run_dir / part.dir
            if recorded_key(folder) != part.key:
                write_json(folder / IDENTITY_FILE, part.identity)
        self.check_lock()
        write_record(self._view)
        logs.set_up(self.config.resources.log_level, to_stderr=False)
        logs.prune(self.run_dir)
        self._reporter.log = logs.log_of(self.run_dir)
        self._remove_seals()

    def _persist(self, act: Callable[[], T]) -> T:
        """Return the result of `act`, retrying it after pauses. The driver does nothing else meanwhile."""
        return persist(act, self.config.resources.max_attempts, self._reporter.line)

    def check_lock(self) -> None:
        """Raise LockLost when another driver has taken over."""
        assert self._check is not None
        self._check()

    def _remove_seals(self) -> None:
        """Under --from, delete the seals of the stages to be redone. Their output files stay until units replace them."""
        if self.options.from_stage is None:
            return
        names = [spec.name for spec in self._view.specs]
        redone = names[names.index(self.options.from_stage) :]
        for part in self._view.all_parts():
            if part.stage in redone:
                for manifest in list((self.run_dir / part.dir / MANIFESTS_DIR).rglob("*.json")):
                    self.check_lock()
                    manifest.unlink(missing_ok=True)

    def advance(self) -> list[Unit]:
        """Units of the stages that may begin now. The run is over when no units are returned and none are running.

        Raises InputError when the survey shows that a target is impossible, or when --only lacks the input of its stage.
        """
        self.can_advance = False
        while self._ended:
            self._finish(self._ended.pop(0))
        units: list[Unit] = []
        while self.is_active and (spec := self._next()) is not None:
            self._waiting.remove(spec)
            selected = self._select(spec)
            if selected:
                self._running[spec.name] += len(selected)
                units += selected
            else:
                self._finish(spec)
        if not units and not self._running:
            assert not self.is_active or not self._waiting, f"{self._waiting} wait for stages that never finish"
            self.is_active = False
        return units

    def _next(self) -> StageSpec | None:
        """The first stage that may begin: stages in its `after` have finished, and units of those in `beside` are listed."""
        waiting = {spec.name for spec in self._waiting}
        for spec in self._waiting:
            if self._finished.issuperset(spec.after) and waiting.isdisjoint(spec.beside):
                return spec
        return None

    def _select(self, spec: StageSpec) -> list[Unit]:
        only = self.options.only_stage
        names = [one.name for one in self._view.specs]
        if only is not None and names.index(spec.name) > names.index(only):
            return []  # an earlier stage is unfinished, so the units of this stage cannot be listed yet
        self.check_lock()
        units = self._persist(lambda: self._view.units(spec.name))
        selected = self._persist(lambda: select(units, self.options.verify))
        if only is not None and spec.name != only:
            if selected:
                raise InputError(
                    f"--only {only} needs {spec.name}, of which {len(selected)} of {len(units)} units are not done; "
                    "run without --only"
                )
            return []
        self._delete(leftovers(units, selected))
        self._num_readers.update(path for unit in selected for path in unit.reads)
        self._num_run += len(selected)
        self._num_reused += len(units) - len(selected)
        kinds = Counter(kind_of(unit.name) for unit in selected)
        self._write(
            Event(
                time=now(), event=STAGE_BEGINS, stage=spec.name, num_units=len(selected), num_reused=len(units) - len(selected),
                kinds=dict(kinds),
            )
        )  # fmt: skip
        return selected

    def _delete(self, files: Iterable[str]) -> None:
        self.check_lock()
        self._persist(lambda: delete(self.run_dir, files))

    def _finish(self, spec: StageSpec) -> None:
        """All units of a stage are sealed: publish its results, and check the survey if the stage made it."""
        self._finished.add(spec.name)
        if self.options.only_stage in (None, spec.name):
            self._reporter.end(spec.name)
            self.check_lock()
            self._persist(lambda: self._publish(spec))
        if spec.makes_survey:
            self._check_surveyed()

    def _check_surveyed(self) -> None:
        for spec in self._view.specs:
            spec.check_surveyed(self._view)
        for spec in self._view.specs:
            for line in spec.remarks(self._view):
                self._reporter.line(line)

    def _publish(self, spec: StageSpec) -> None:
        sweep(self.run_dir, [part.dir for part in self._view.parts(spec.name)], TRANSIENT_DIRS)
        for publication in spec.publications(self._view):
            publish(self.run_dir, publication, self.check_lock)
            self._is_reported |= publication.name == REPORT_FILE

    def started(self, unit: Unit, worker: str) -> None:
        """A unit has been given to a worker, or to a task on a CPU, which has no name."""
        hold = unit.hold.label if unit.hold is not None else ""
        path = f"{unit.part_dir}/{unit.name}"
        self._write(Event(time=now(), event=STARTED, stage=unit.stage, unit=path, worker=worker, hold=hold))

    def done(self, unit: Unit, outcome: Outcome) -> None:
        """A unit is sealed: delete the transient files that no unit will read: some of its input, perhaps of its output."""
        self._num_readers.subtract(unit.reads)
        unread = [path for path in unit.reads if not self._num_readers[path]]
        self._delete([*unread, *(path for path in unit.writes if path not in self._num_readers)])
        self._reporter.done(unit, outcome)
        if (failure := failure_in(outcome.facts)) is not None:
            self._shortfalls.append(f"{unit.stage} {unit.label}: {failure}")
        self._write_event(SEALED, unit, outcome)
        self._running[unit.stage] -= 1
        if not self._running[unit.stage]:
            del self._running[unit.stage]
            self._ended += [spec for spec in self._view.specs if spec.name == unit.stage]
            self.can_advance = True

    def retried(self, unit: Unit, outcome: Outcome, how: str) -> None:
        """A unit failed and will be tried again."""
        assert outcome.failure is not None
        self.check_lock()
        self._reporter.line(f"{unit.stage} {unit.label}: {outcome.failure.message}; trying again {how}")
        self._write_event(LOST, unit, outcome)

    def failed(self, failure: UnitFailure) -> None:
        """A unit failed for good: the run ends once its other running units have ended."""
        self.check_lock()
        if not self.failures:
            self._reporter.line(f"{failure.unit.stage} {failure.unit.label} failed; waiting for what still runs")
        self.failures.append(failure)
        self.is_active = False
        with contextlib.suppress(*failures()):  # such as the full disk for which the unit failed; the log is for information
            self._write_event(FAILED, failure.unit, failure.outcome)

    def _write_event(self, event: str, unit: Unit, outcome: Outcome) -> None:
        num_tokens = outcome.facts.get("num_tokens")
        self._write(
            Event(
                time=now(),
                event=event,
                stage=unit.stage,
                unit=f"{unit.part_dir}/{unit.name}",
                host=outcome.host,
                elapsed_s=max(0.0, round(outcome.elapsed_s, 3)),
                open_s=max(0.0, round(outcome.open_s, 3)),
                peak_bytes=outcome.peak_bytes,
                gpu_peak_bytes=outcome.gpu_peak_bytes,
                bytes_read=outcome.bytes_read,
                bytes_written=outcome.bytes_written,
                num_tokens=num_tokens if isinstance(num_tokens, int) else 0,
                message=outcome.failure.message if outcome.failure else "",
            )
        )

    def _write(self, event: Event) -> None:
        """Log an event and show it."""
        events = self._events
        assert events is not None
        self._reporter.note(event)
        self._persist(lambda: events.write(event))

    def refuse(self, error: InputError) -> None:
        """Stop the run because of a mistake in the user's input."""
        self._refusal = error
        self.is_active = False

    def lose(self, error: LockLost) -> None:
        """Another driver has taken over: stop the run and write nothing more, not even a log line."""
        self._reporter.log = None
        self._refusal = error
        self.is_active = False

    def close(self) -> None:
        """End the progress bars and the event log, with or without success."""
        event = Event(time=now(), event=RUN_ENDS, num_failed=len(self.failures))
        self._reporter.note(event)
        self._reporter.end_all()
        if self._events is not None:
            with contextlib.suppress(LockLost, *failures()):  # then the other driver logs how the run ended, or nobody can
                self._events.write(event)

    def result(self) -> RunResult:
        """The result of the run. Raises InputError or RunFailed (also its subclass LockLost) if the run failed."""
        if self._refusal is not None:
            raise self._refusal
        if self.failures:
            raise self._error()
        path = self.run_dir / REPORT_FILE
        report = json.loads(path.read_text()) if self._is_reported else {"models": [], "warnings": []}
        elapsed_s = time.monotonic() - self._started
        return RunResult(report, path, self._num_run, self._num_reused, elapsed_s, tuple(self._shortfalls))

    def _error(self) -> InputError | RunFailed:
        """The error that stopped the run: InputError if only the user's input is wrong, else RunFailed."""
        lines = [_describe(failure) for failure in self.failures]
        kinds = {failed.outcome.failure.kind for failed in self.failures if failed.outcome.failure}
        if kinds == {"input"}:
            return InputError("\n".join(dict.fromkeys(lines)))
        if kinds == {"outside"}:  # one cause, such as a full disk, fails every unit that writes
            others = f" (and {len(lines) - 1} more units)" if len(lines) > 1 else ""
            return RunFailed(
                f"{lines[0]}{others}; what was finished is kept: mend this and the same command continues from there"
            )
        lines.append(f"What was finished is kept in {self.run_dir}; the same command continues from there.")
        return RunFailed("\n".join(lines))


def _describe(failed: UnitFailure) -> str:
    failure = failed.outcome.failure
    assert failure is not None
    if failure.kind == "input":
        return failure.message
    tries = f" (tried {failed.attempts} times)" if failed.attempts > 1 else ""
    where = f" on {failed.outcome.host}" if failed.outcome.host else ""
    text = f"{failed.unit.stage} {failed.unit.label}{where}: {failure.message}{tries}"
    if failure.kind == "memory":
        needed = filesize.decimal(failed.unit.memory_bytes) if failed.unit.memory_bytes else "more memory than the node has"
        text += (
            f"\n  it needs about {needed} beside the {filesize.decimal(600_000_000)} of a Python process with torch; lower "
            "resources.layers_per_shard (one layer at least), calibration.tokens_per_shard or tokens_per_micro_batch (of a "
            "refit, resources.worker_memory or calibration.num_sequences), or use nodes with more memory"
        )
    return f"{text}\n{failure.detail}".rstrip() if failure.kind == "error" else text
