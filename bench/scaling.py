"""Real workers on one machine: how much sooner a stage is done by more of them, each on a core of its own."""

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

from bench import measure
from stages.contracts.events import EVENTS_FILE, SEALED, STARTED

_MARK = "HCSMOE_PINNED"
_LOOK_S = 0.2
_WORKER_TITLE = "ray::Worker"


class Pinned(threading.Thread):
    """Pins every worker process of one run, by its name in their environment, to one core: round robin over all cores."""

    def __init__(self, name: str) -> None:
        super().__init__(daemon=True)
        self._run = name
        self._cores: dict[int, int] = {}
        self._over = threading.Event()

    @property
    def num_pinned(self) -> int:
        """Worker processes found so far."""
        return len(self._cores)

    def __enter__(self) -> "Pinned":
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        """Until the end, look for workers and for new threads of theirs."""
        while not self._over.wait(_LOOK_S):
            for pid in psutil.pids():
                with contextlib.suppress(psutil.Error, OSError):
                    self._look(psutil.Process(pid))

    def _look(self, process: psutil.Process) -> None:
        pid = process.pid
        if pid not in self._cores:
            title = " ".join(process.cmdline())
            if not title.startswith(_WORKER_TITLE) or process.environ().get(_MARK) != self._run:
                return
            cores = sorted(os.sched_getaffinity(0))
            self._cores[pid] = cores[len(self._cores) % len(cores)]
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {self._cores[pid]})


def stage_s(run_dir: Path, stage: str) -> float:
    """Seconds from the start of a stage's first unit to the seal of its last, by the run's own log: Ray's start and the stages
    around it are not in it."""
    times = []
    for line in (run_dir / EVENTS_FILE).read_text().splitlines():
        event = json.loads(line)
        if event["event"] in (STARTED, SEALED) and event["unit"].startswith(f"{stage}-"):
            times.append(event["time"])
    return float(times[-1] - times[0])


def pinned_stage_s(command: Sequence[str], run_dir: Path, num_workers: int, stage: str) -> float:
    """Seconds of a stage of a run on Ray with its workers pinned. Raises RuntimeError when not all of them were found."""
    name = uuid.uuid4().hex
    environment = {
        _MARK: name, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled",
        "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": num_workers}),
    }  # fmt: skip
    with Pinned(name) as pinned:
        measure.run(command, False, **environment)
    if pinned.num_pinned < num_workers:
        raise RuntimeError(f"{pinned.num_pinned} worker processes were found to pin, of {num_workers}")
    return stage_s(run_dir, stage)
