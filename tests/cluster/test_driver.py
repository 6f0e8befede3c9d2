"""Drivers that are killed, interrupted or doubled; real processes of the command line."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.cluster.conftest import results_of
from tests.conftest import REPOSITORY
from tests.forks import Fork

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]
RunFile = Callable[[dict[str, Any]], Path]
STRUCK_STAGES = ("prepare", "calibrate", "cluster", "merge", "assemble", "evaluate")
_LIMIT_S = 500


def start(run_file: Path, *options: str, module: str = "pipeline") -> Fork:
    """Start a driver in a session of its own. The test has the fixture `forks`, or one that does."""
    return Fork(["-m", module, "run", str(run_file), *options], REPOSITORY, os.environ)


def events_of(run_file: Path) -> list[dict[str, Any]]:
    path = run_file.parent / "run" / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_units(run_file: Path, num_units: int, process: Fork) -> None:
    """Wait until so many units are sealed, or the driver has ended."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        if num_sealed(run_file) >= num_units:
            return
        time.sleep(0.03)


def num_sealed(run_file: Path, stage: str = "") -> int:
    return sum(event["event"] == "sealed" and event["unit"].startswith(stage) for event in events_of(run_file))


def wait_for_stage(run_file: Path, stage: str, process: Fork) -> None:
    """Wait until one more unit of a stage is sealed, or the driver has ended."""
    already, deadline = num_sealed(run_file, stage), time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline and process.poll() is None and num_sealed(run_file, stage) <= already:
        time.sleep(0.03)


def test_a_driver_killed_in_every_stage_repeats_no_sealed_unit(
    run_file: RunFile, undisturbed: dict[str, dict[str, str]]
) -> None:
    """SIGKILL, the same command each time. The driver computes too (local executor), so units die with it. `make chaos` has
    random moments."""
    path = run_file({"resources.num_gpus": None, "resources.layers_per_shard": 1})  # enough units to be killed in
    for number, stage in enumerate(STRUCK_STAGES):
        process = start(path, "--executor", "local")
        wait_for_stage(path, stage, process)
        time.sleep(0.01 * number)  # into the unit that follows, each time further
        assert process.poll() is None, "each kill strikes a running driver"
        process.kill()
        process.communicate(timeout=_LIMIT_S)
    process = start(path, "--executor", "local")
    output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 0, output
    assert "took over the stale lock" in output
    sealed = [event["unit"] for event in events_of(path) if event["event"] == "sealed"]
    assert len(sealed) == len(set(sealed)), "no sealed unit ran twice"
    assert results_of(path) == undisturbed
    assert not list((path.parent / "run").rglob(".tmp-*"))


def test_a_killed_driver_of_a_cluster_leaves_work_that_the_next_one_uses(
    cluster: Cluster, run_file: RunFile, undisturbed: dict[str, dict[str, str]]
) -> None:
    path = run_file({})
    process = start(path, "--address", cluster.address)
    wait_for_units(path, 20, process)
    assert process.poll() is None
    process.kill()
    process.communicate(timeout=_LIMIT_S)
    before = [event["unit"] for event in events_of(path) if event["event"] == "sealed"]
    process = start(path, "--address", cluster.address)
    output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 0, output
    assert results_of(path) == undisturbed
    sealed = [event["unit"] for event in events_of(path) if event["event"] == "sealed"]
    assert sealed[: len(before)] == before
    assert len(sealed) == len(set(sealed)), "no sealed unit ran twice"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_says_how_to_resume_and_releases_the_lock(
    cluster: Cluster, run_file: RunFile, signum: signal.Signals
) -> None:
    path = run_file({})
    process = start(path, "--address", cluster.address)
    wait_for_units(path, 6, process)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 130, output
    assert "interrupted; what was finished is kept, and the same command continues from there" in output
    assert "Traceback" not in output
    assert not (path.parent / "run" / "driver.lock").exists()


def test_a_second_driver_is_refused_by_name(run_file: RunFile) -> None:
    path = run_file({"resources.num_gpus": None})
    first = start(path, "--executor", "local")
    wait_for_units(path, 3, first)
    os.kill(first.pid, signal.SIGSTOP)  # alive, and in the middle of it
    second = start(path, "--executor", "local")
    output, _ = second.communicate(timeout=_LIMIT_S)
    os.kill(first.pid, signal.SIGCONT)
    rest, _ = first.communicate(timeout=_LIMIT_S)
    assert second.returncode == 2
    assert f"pid {first.pid}" in output and "is in use by another driver" in output
    assert first.returncode == 0, rest
