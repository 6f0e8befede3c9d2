"""`ray job stop`: the job's driver ends its workers, releases the lock and says how to go on; the same submission does."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.example_run import RUN, SMALL, assert_complete
from tests.deploy.ray_head import RayHead, ray_head

_LIMIT_S = 500
# Hundreds of short units: `ray job stop` takes seconds to start, and is to strike in the middle of them.
MANY_UNITS = (
    "--set", "calibration.num_sequences=512", "--set", "calibration.sequence_length=32",
    "--set", "calibration.tokens_per_shard=32", "--set", "resources.layers_per_shard=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


def _wait(what: str, is_so: Callable[[], bool], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"no {what} after {_LIMIT_S} s:\n{log()}"
        time.sleep(0.1)


def _events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _sealed(run_dir: Path) -> list[str]:
    return [event["unit"] for event in _events(run_dir) if event["event"] == "sealed"]


@pytest.mark.slow
def test_a_stopped_job_leaves_no_worker_and_no_lock_and_is_continued(head: RayHead, clone: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    entrypoint = (*RUN, *SMALL, *MANY_UNITS, "--set", f"run_dir={run_dir}")
    options = ("--address", head.address, "--working-dir", ".", "--no-wait")
    submitted = head.ray("job", "submit", *options, "--", *entrypoint, cwd=clone)
    found = re.search(r"raysubmit_\w+", submitted.stdout)
    assert found, submitted.stdout
    job = found[0]

    def log() -> str:
        return head.ray("job", "logs", "--address", head.address, job, cwd=clone).stdout

    _wait("sealed unit of calibrate", lambda: any(unit.startswith("calibrate-") for unit in _sealed(run_dir)), log)
    stopped = head.ray("job", "stop", "--address", head.address, job, cwd=clone)
    assert stopped.returncode == 0, stopped.stdout
    assert head.status(job) == "STOPPED"
    text = log()
    assert "interrupted; what was finished is kept, and the same command continues from there" in text
    assert "Traceback" not in text
    assert not (run_dir / "driver.lock").exists()
    assert not (run_dir / "report.json").exists(), "stopped in the middle"
    _wait("end of the workers", lambda: not head.worker_titles(), lambda: "\n".join(head.worker_titles()))
    before = _sealed(run_dir)
    again = head.submit(*entrypoint, working_dir=clone)
    assert (again.exit_code, again.status) == (0, "SUCCEEDED"), again.log
    assert_complete(run_dir)
    sealed = _sealed(run_dir)
    assert sealed[: len(before)] == before
    assert len(sealed) == len(set(sealed)), "no sealed unit ran twice"
