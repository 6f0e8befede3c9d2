"""One run, stage by stage: what the driver asks for units and tells of their ends."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline import checks
from pipeline.config import RunConfig
from pipeline.display.progress import Reporter
from pipeline.display.sizes import human_bytes
from pipeline.display.tables import weights_lines
from pipeline.driver.retry import persist
from pipeline.driver.selection import delete, leftovers, select, sweep
from pipeline.driver.units import Outcome, Unit
from pipeline.errors import LockLost, RunFailed
from pipeline.names import STAGES
from pipeline.run.graph import Graph
from pipeline.run.owned import IDENTITY_FILE, recorded_key
from pipeline.run.publish import publish_model, publish_report
from pipeline.run.record import write_record
from pipeline.run.run_dir import check_run_dir
from pipeline.run.stage_keys import Stages
from pipeline.state import logs
from pipeline.state.events import FAILED, LOST, RUN_BEGINS, RUN_ENDS, SEALED, STAGE_BEGINS, STARTED, EventLog
from pipeline.state.manifest import MANIFESTS_DIR
from stages.contracts.errors import InputError
from stages.contracts.paths import REPORT_FILE, TRANSIENT_DIRS
from stages.io.files import write_json
from stages.io.storage import absolute

T = TypeVar("T")


@dataclass(frozen=True)
class UnitFailure:
    """A unit that did not finish, and how often it was tried."""

    unit: Unit
    outcome: Outcome
    attempts: int


@dataclass(frozen=True)
class RunOptions:
    """How a run is to be run.

    verify: compare digests of finished files. from_stage: redo this stage and what follows. only_stage: run nothing else.
    """

    verify: bool = False
    from_stage: str | None = None
    only_stage: str | None = None


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the report (as parsed; no models if --only left it out) and how many units it ran."""

    report: Mapping[str, Any]
    report_path: Path
    num_run: int
    num_reused: int
    elapsed_s: float


class RunState:
    """A run in progress. `checked` is what `checks.check` returned for its config.

    Raises InputError or RunFailed for a run directory that it cannot work in.
    """

    def __init__(self, config: RunConfig, checked: checks.Checked, reporter: Reporter, options: RunOptions) -> None:
        self.config, self.options, self._reporter = config, options, reporter
        self.run_dir = absolute(config.run_dir)
        self.stages = Stages(config, checked.identities)
        self.model, self._identities = checked.model, checked.identities
        check_run_dir(self.run_dir, self.model, self.stages)
        for dataset in checked.datasets.values():
            if dataset.note:
                reporter.line(dataset.note)
        self.failures: list[UnitFailure] = []
        self._refusal: InputError | LockLost | None = None
        self.is_active = True
        self._remaining = list(STAGES)
        self._wanted: set[str] = set()
        self._stage: str | None = None
        self._started = time.monotonic()
        self._events: EventLog | None = None
        self._graph: Graph | None = None
        self._check: Callable[[], None] | None = None
        self._num_run = self._num_reused = 0

    def begin(self, num_workers: int, check_lock: Callable[[], None]) -> None:
        """The lock is held and the executor is up: record what is run, clear what killed workers have left.

        check_lock: raises LockLost when the lock is somebody else's. It is called before each thing that this run does to its
        directory, and so this and all methods that follow may raise it, `close` and `result` aside.
        """
        self._started = time.monotonic()
        self._check = check_lock
        self._graph = Graph(self.config, self.stages, self.run_dir, self.model, num_workers)
        self._events = EventLog(self.run_dir, check_lock)
        self._persist(self._record)
        self._events.write(RUN_BEGINS, num_workers=num_workers)

    def _record(self) -> None:
        self.check_lock()
        stage_dirs = [stage.dir for stage in self.stages.all()]
        sweep(self.run_dir, stage_dirs)
        for stage in self.stages.all():
            folder = self.run_dir / stage.dir
            if recorded_key(folder) != stage.key:
                write_json(folder / IDENTITY_FILE, stage.identity)
        self.check_lock()
        write_record(self.run_dir, self.config, self.model, self._identities, stage_dirs)
        logs.set_up(self.config.resources.log_level, to_stderr=False)
        logs.prune(self.run_dir)
        self._reporter.log = logs.log_of(self.run_dir)
        self._forget_seals()

    def _persist(self, act: Callable[[], T]) -> T:
        """What `act` returns, however often it has to be tried; the driver waits meanwhile."""
        return persist(act, self.config.resources.max_attempts, self._reporter.line)

    def check_lock(self) -> None:
        """Raise LockLost when another driver has taken over."""
        assert self._check is not None
        self._check()

    def _forget_seals(self) -> None:
        """Under --from, unseal the stages to be redone; what they wrote is replaced file by file."""
        if self.options.from_stage is None:
            return
        redone = STAGES[STAGES.index(self.options.from_stage) :]
        for stage in self.stages.all():
            if stage.stage in redone:
                for manifest in list((self.run_dir / stage.dir / MANIFESTS_DIR).rglob("*.json")):
                    self.check_lock()
                    manifest.unlink(missing_ok=True)

    @property
    def graph(self) -> Graph:
        """The run's units."""
        assert self._graph is not None
        return self._graph

    def advance(self) -> list[Unit]:
        """Units of the next stage that has any to run; none when the run is over.

        Raises InputError when the survey shows that a target cannot be, or when --only lacks what it reads.
        """
        while self.is_active:
            self._end_stage()
            if not self._remaining:
                self.is_active = False
                return []
            self._stage = self._remaining.pop(0)
            if selected := self._select(self._stage):
                return selected
        return []

    def _select(self, stage: str) -> list[Unit]:
        only = self.options.only_stage
        if only is not None and STAGES.index(stage) > STAGES.index(only):
            return []  # its units are not even known where a stage before is not done
        self.check_lock()
        units = self._persist(lambda: self.graph.units(stage))
        selected = self._persist(lambda: select(units, self.options.verify))
        if only is not None and stage != only:
            if selected:
                raise InputError(
                    f"--only {only} needs {stage}, of which {len(selected)} of {len(units)} units are not done; "
                    "run without --only"
                )
            return []
        self._delete(leftovers(units, selected))
        self._wanted = {path for unit in selected for path in unit.reads}
        self._num_run += len(selected)
        self._num_reused += len(units) - len(selected)
        self._reporter.begin(stage, len(selected), len(units) - len(selected))
        self._write(STAGE_BEGINS, stage=stage, num_units=len(selected), num_reused=len(units) - len(selected))
        return selected

    def _delete(self, files: Iterable[str]) -> None:
        self.check_lock()
        self._persist(lambda: delete(self.run_dir, files))

    def _end_stage(self) -> None:
        stage, self._stage = self._stage, None
        if stage == "prepare":
            checks.check_layers(self.config, len(self.graph.plan["moe_layers"]))
            checks.check_mtp(self.config, self.graph.plan)
            for line in weights_lines(self.graph.plan):
                self._reporter.line(line)
        if stage is None or (self.options.only_stage not in (None, stage)):
            return
        self._reporter.end()
        self.check_lock()
        self._persist(lambda: self._publish(stage))

    def _publish(self, stage: str) -> None:
        sweep(self.run_dir, [part.dir for part in self.stages.all() if part.stage == stage], TRANSIENT_DIRS)
        if stage == "assemble":
            for target in self.stages.targets:
                publish_model(self.run_dir, target.name, self.graph.checkpoint_dir(target), self.check_lock)
        elif stage == "report":
            self.check_lock()
            publish_report(self.run_dir, self.run_dir / self.stages.report.dir / REPORT_FILE)

    def started(self, unit: Unit) -> None:
        """A unit is given to a worker."""
        self._write(STARTED, unit=f"{unit.stage_dir}/{unit.name}")

    def done(self, unit: Unit, outcome: Outcome) -> None:
        """A unit is sealed: what it alone read is deleted, and what it wrote (again) for units that are sealed."""
        self._delete([*unit.reads, *(set(unit.writes) - self._wanted)])
        self._reporter.done(unit, outcome)
        self._write_event(SEALED, unit, outcome)

    def retried(self, unit: Unit, outcome: Outcome, how: str) -> None:
        """A unit is to be tried again."""
        assert outcome.failure is not None
        self.check_lock()
        self._reporter.line(f"{unit.stage} {unit.label}: {outcome.failure.message}; trying again {how}")
        self._write_event(LOST, unit, outcome)

    def failed(self, failure: UnitFailure) -> None:
        """A unit failed for good: the run stops once its other running units have ended."""
        self.check_lock()
        if not self.failures:
            self._reporter.line(f"{failure.unit.stage} {failure.unit.label} failed; waiting for what still runs")
        self.failures.append(failure)
        self.is_active = False
        self._write_event(FAILED, failure.unit, failure.outcome)

    def _write_event(self, event: str, unit: Unit, outcome: Outcome) -> None:
        message = outcome.failure.message if outcome.failure else None
        self._write(
            event,
            unit=f"{unit.stage_dir}/{unit.name}",
            host=outcome.host,
            elapsed_s=round(outcome.elapsed_s, 3),
            message=message,
        )

    def _write(self, event: str, **fields: Any) -> None:
        events = self._events
        assert events is not None
        self._persist(lambda: events.write(event, **fields))

    def refuse(self, error: InputError) -> None:
        """The run cannot go on for what the user has to mend."""
        self._refusal = error
        self.is_active = False

    def lose(self, error: LockLost) -> None:
        """Another driver has taken over: nothing more is written, not even to a log."""
        self._reporter.log = None
        self._refusal = error
        self.is_active = False

    def close(self) -> None:
        """End bars and the event log, however the run ended."""
        self._reporter.end()
        if self._events is not None:
            with contextlib.suppress(LockLost):  # then it is another driver's to say how the run ended
                self._events.write(RUN_ENDS, num_failed=len(self.failures))

    def result(self) -> RunResult:
        """What the run leaves. Raises InputError or RunFailed (LockLost among them) if it failed."""
        if self._refusal is not None:
            raise self._refusal
        if self.failures:
            raise self._error()
        path = self.run_dir / REPORT_FILE
        is_reported = self.options.only_stage in (None, STAGES[-1])
        report = json.loads(path.read_text()) if is_reported else {"models": [], "warnings": []}
        return RunResult(report, path, self._num_run, self._num_reused, time.monotonic() - self._started)

    def _error(self) -> InputError | RunFailed:
        """What stopped the run: InputError if there is nothing but the user's input to mend, else RunFailed."""
        lines = [_describe(failure) for failure in self.failures]
        kinds = {failed.outcome.failure.kind for failed in self.failures if failed.outcome.failure}
        if kinds == {"input"}:
            return InputError("\n".join(dict.fromkeys(lines)))
        if kinds == {"outside"}:  # one cause, met by all units that were writing
            others = f" (and {len(lines) - 1} more units)" if len(lines) > 1 else ""
            return RunFailed(f"{lines[0]}{others}; what was finished is kept, and the same command continues from there")
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
        needed = human_bytes(failed.unit.memory_bytes) if failed.unit.memory_bytes else "more memory than the node has"
        text += (
            f"\n  it needs about {needed} beside the {human_bytes(600_000_000)} of a Python process with torch; lower "
            "resources.layers_per_shard (one layer at least), calibration.tokens_per_shard or tokens_per_micro_batch, or "
            "use nodes with more memory"
        )
    return f"{text}\n{failure.detail}".rstrip() if failure.kind == "error" else text
