"""`status` shows what runs, what failed and what was reused, from the files of a run directory alone."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.commands.status import describe_status
from pipeline.config import load_config
from pipeline.executors.base import Slot
from pipeline.executors.local import LocalExecutor
from pipeline.state.events import last_run
from pipeline.state.liveness import describe_process
from pipeline.state.lock import LOCK_FILE
from stages.contracts.errors import InputError
from stages.contracts.events import EVENTS_FILE
from stages.contracts.units import Call, Unit
from tests.pipeline.fake import ToyArgs
from tests.runs import FinishedRun, execute, write_run_file


def shown(run_dir: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    for item in describe_status(run_dir):
        console.print(item, highlight=False, markup=False, soft_wrap=isinstance(item, str))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Looking(LocalExecutor):
    """Looks at the status while a unit runs, or lets it fail."""

    def __init__(self, run_dir: Path, fails: str = "") -> None:
        super().__init__()
        self._run_dir, self._fails = run_dir, fails
        self.seen = ""

    def submit(self, slot: Slot, unit: Unit) -> None:
        if unit.stage == "cluster" and not self.seen:
            self.seen = shown(self._run_dir)
        if f"{unit.stage}/{unit.name}" == self._fails:
            unit = replace(unit, call=Call("tests.pipeline.fake:fail_input", ToyArgs(unit.name)))
        super().submit(slot, unit)


@pytest.fixture
def run_file(tmp_path: Path, finished_run: Callable[[str], FinishedRun]) -> Path:
    done = finished_run("mixtral")
    return write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), {})


def test_status_names_what_runs_since_when_and_what_failed_and_why(run_file: Path) -> None:
    run_dir = run_file.parent / "run"
    config = load_config(run_file, [])
    looking = Looking(run_dir, fails="cluster/layer-0001")
    with pytest.raises(InputError, match="layer-0001: the value is 3"):
        execute(config, lambda: looking)
    (running,) = [line for line in looking.seen.splitlines() if line.startswith("running since ")]
    assert time.strftime("%Y-%m-%d") in running and "cluster-" in running and "/layer-0000" in running
    after = shown(run_dir)
    assert "running since" not in after
    (failed,) = [line for line in after.splitlines() if line.startswith("failed on ")]
    assert "/layer-0001: layer-0001: the value is 3 but at most 2 fit; use 2" in failed
    result, _ = execute(config)
    again = shown(run_dir)
    assert "failed" not in again
    assert last_run(run_dir).reused["calibrate"] > 0
    assert result.num_reused == sum(last_run(run_dir).reused.values())


def test_a_line_that_a_killed_driver_left_half_written_is_passed_over(run_file: Path) -> None:
    done = FinishedRun.of(run_file)
    path = done.run_dir / EVENTS_FILE
    path.write_text(path.read_text()[:-20] + path.read_text())
    assert last_run(done.run_dir).is_over
    assert "running since" not in shown(done.run_dir)
    path.unlink()
    assert "no driver is running" in shown(done.run_dir)


def test_a_driver_that_is_gone_is_said_to_be_gone(run_file: Path) -> None:
    done = FinishedRun.of(run_file)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    path = done.run_dir / LOCK_FILE
    holder = {**describe_process(), "pid": ended.pid, "since": "2026-01-02 03:04:05 UTC", "token": "t"}
    path.write_text(json.dumps(holder))
    assert f"pid {ended.pid}, since 2026-01-02 03:04:05 UTC; that process is gone" in shown(done.run_dir)
    path.write_text(json.dumps({**holder, "host": "elsewhere"}))
    os.utime(path, (time.time() - 1000, time.time() - 1000))
    assert "no sign of life for 1000 s" in shown(done.run_dir)
    path.unlink()
