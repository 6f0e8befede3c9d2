"""How far a run is, from its events: counts, rates and time left by stage, and what each worker does.

The driver adds events as it logs them; `status --watch` adds them as it reads the log.
"""

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field

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
)


@dataclass
class StageProgress:
    """A stage of the run. num_units: to run, without those that an earlier run has sealed (num_reused); None before they are
    listed. began, ended: seconds since 1970, from the first unit given out to the last sealed. num_bytes: read and written.
    left: units that are not sealed, by kind. times_s: seconds of sealed units by kind, ascending."""

    name: str
    num_units: int | None = None
    num_reused: int = 0
    num_done: int = 0
    began: float | None = None
    ended: float | None = None
    num_tokens: int = 0
    num_bytes: int = 0
    work_s: float = 0.0
    left: Counter[str] = field(default_factory=Counter)
    times_s: dict[str, list[float]] = field(default_factory=dict)

    def elapsed_s(self, now: float) -> float:
        """Seconds since its first unit was given out, until its end."""
        return 0.0 if self.began is None else max(0.0, (now if self.ended is None else self.ended) - self.began)

    def rate(self, amount: int, now: float) -> float | None:
        """An amount a second, on average over the stage so far; None within its first tenth of a second."""
        elapsed_s = self.elapsed_s(now)
        return amount / elapsed_s if amount and elapsed_s >= 0.1 else None

    def left_s(self, now: float) -> float | None:
        """Seconds until its end: what is left of each kind of unit at the median time of those that are done, as many at once
        as so far on average. A kind of which none is done counts with the median of all. None before a unit is done."""
        if self.num_units is not None and self.num_done >= self.num_units:
            return 0.0
        every = sorted(time_s for times_s in self.times_s.values() for time_s in times_s)
        if not every:
            return None
        left_s = sum(count * _median(self.times_s.get(kind) or every) for kind, count in self.left.items())
        at_once = max(1.0, self.work_s / self.elapsed_s(now)) if self.elapsed_s(now) else 1.0
        return left_s / at_once


def _median(ascending: list[float]) -> float:
    middle = len(ascending) // 2
    return ascending[middle] if len(ascending) % 2 else (ascending[middle - 1] + ascending[middle]) / 2


@dataclass
class WorkerProgress:
    """A worker. hold: what it holds, such as a layer shard. stage, unit: what it runs; unit is empty if nothing. since: when
    that was given to it, in seconds since 1970. peak_bytes, gpu_peak_bytes: of its last unit; zero before."""

    name: str
    host: str = ""
    hold: str = ""
    stage: str = ""
    unit: str = ""
    since: float = 0.0
    peak_bytes: int = 0
    gpu_peak_bytes: int = 0


class RunProgress:
    """All of a run. A run that begins again starts from nothing. num_retried: units that were tried again."""

    def __init__(self) -> None:
        self.stages: dict[str, StageProgress] = {}
        self.workers: dict[str, WorkerProgress] = {}
        self.tasks: set[str] = set()
        """Units that run as tasks on CPUs."""
        self.num_retried = self.num_failed = 0
        self.began: float | None = None
        self.is_over = False
        self._runs_on: dict[str, str] = {}

    def note(self, event: Event) -> None:
        """Add an event."""
        if event.event == RUN_BEGINS:
            self._begin(event)
        elif event.event == STAGE_BEGINS:
            stage = self._stage(event.stage)
            stage.num_units, stage.num_reused = event.num_units, event.num_reused
            stage.left = Counter(event.kinds)
        elif event.event == STARTED:
            self._start(event)
        elif event.event in (SEALED, LOST, FAILED):
            self._end(event)
        elif event.event == RUN_ENDS:
            self.is_over = True

    def _begin(self, event: Event) -> None:
        self.began, self.is_over = event.time, False
        self.stages = {name: StageProgress(name) for name in event.stages}
        self.workers, self.tasks, self._runs_on = {}, set(), {}
        self.num_retried = self.num_failed = 0

    def _stage(self, name: str) -> StageProgress:
        return self.stages.setdefault(name, StageProgress(name))

    def _start(self, event: Event) -> None:
        stage = self._stage(event.stage)
        stage.began = event.time if stage.began is None else stage.began
        if not event.worker:
            self.tasks.add(event.unit)
            return
        worker = self.workers.setdefault(event.worker, WorkerProgress(event.worker))
        worker.stage, worker.unit, worker.since = event.stage, event.unit, event.time
        worker.hold = event.hold or worker.hold
        self._runs_on[event.unit] = event.worker

    def _end(self, event: Event) -> None:
        self.tasks.discard(event.unit)
        name = self._runs_on.pop(event.unit, "")
        if event.event == LOST:
            self.num_retried += 1
            self.workers.pop(name, None)  # it comes back with its next unit, if it lives
            return
        if name in self.workers:
            worker = self.workers[name]
            worker.unit, worker.since, worker.host = "", event.time, event.host
            worker.peak_bytes, worker.gpu_peak_bytes = event.peak_bytes, event.gpu_peak_bytes
        if event.event == FAILED:
            self.num_failed += 1
            return
        stage, kind = self._stage(event.stage), kind_of(event.unit)
        stage.num_done += 1
        stage.num_tokens += event.num_tokens
        stage.num_bytes += event.bytes_read + event.bytes_written
        stage.work_s += event.elapsed_s
        stage.left[kind] -= 1
        insort(stage.times_s.setdefault(kind, []), event.elapsed_s)
        if stage.num_done == stage.num_units:
            stage.ended = event.time

    def left_s(self, now: float) -> float | None:
        """Seconds until the end of all stages whose units are listed; None where a stage has none done yet."""
        found = [stage.left_s(now) for stage in self.stages.values() if stage.num_units]
        known = [left_s for left_s in found if left_s is not None]
        return sum(known) if found and len(known) == len(found) else None

    @property
    def num_unlisted(self) -> int:
        """Stages whose units are not listed yet."""
        return sum(stage.num_units is None for stage in self.stages.values())
