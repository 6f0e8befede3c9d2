"""Drivers that were stopped (a laptop's lid, a paused machine) while another took their run over; real processes."""

import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.cluster.conftest import results_of
from tests.cluster.quick_driver import STALE_S
from tests.cluster.test_driver import events_of, start, wait_for_units
from tests.forks import Fork

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]
RunFile = Callable[[dict[str, Any]], Path]
_LIMIT_S = 500
LOCAL = {"resources.num_gpus": None, "resources.layers_per_shard": 1}


def stopped(path: Path, *options: str) -> Fork:
    """A driver in the middle of its run, stopped for longer than its lock lives."""
    process = start(path, *options, module="tests.cluster.quick_driver")
    wait_for_units(path, 4, process)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * STALE_S)
    return process


def number_of(path: Path, event: str) -> int:
    return sum(one["event"] == event for one in events_of(path))


def what_drivers_write(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Change times of all that a driver itself writes, logs included."""
    written = (
        *run_dir.glob("*"),
        *run_dir.glob("models/*"),
        *run_dir.glob("*/identity.json"),
        *run_dir.glob("*/partition.json"),
    )
    found = {path: path.lstat() for path in written if not path.is_dir() or path.is_symlink()}
    return {str(path): (state.st_mtime_ns, state.st_ino) for path, state in found.items()}


def test_a_driver_that_was_replaced_while_it_slept_stops_and_leaves_its_successor_alone(
    run_file: RunFile, undisturbed: dict[str, dict[str, str]]
) -> None:
    path = run_file(LOCAL)
    first = stopped(path, "--executor", "local")
    second = start(path, "--executor", "local", module="tests.cluster.quick_driver")
    until = time.monotonic() + _LIMIT_S
    while number_of(path, "run begins") < 2 and second.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.03)
    os.kill(first.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=_LIMIT_S)
    rest, _ = second.communicate(timeout=_LIMIT_S)
    assert first.returncode == 1, output
    since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \w+"
    holder = rf"host {re.escape(socket.gethostname())}, pid {second.pid}, {since}"
    last = output.splitlines()[-1]
    assert re.fullmatch(
        rf"failed: lost the lock of {re.escape(str(path.parent / 'run'))} to {holder}; nothing more is written; run the same "
        "command again when no other driver runs here",
        last,
    )
    assert "Traceback" not in output
    assert second.returncode == 0, rest
    assert f"took over the stale lock of host {socket.gethostname()}, pid {first.pid}" in rest
    assert results_of(path) == undisturbed
    assert number_of(path, "run ends") == 1, "the first driver has written nothing of its end"
    assert not (path.parent / "run" / "driver.lock").exists()
    assert not list((path.parent / "run").rglob(".tmp-*"))


def test_a_driver_that_wakes_when_its_successor_is_done_writes_nothing(run_file: RunFile) -> None:
    path = run_file(LOCAL)
    first = stopped(path, "--executor", "local")
    second = start(path, "--executor", "local", module="tests.cluster.quick_driver")
    rest, _ = second.communicate(timeout=_LIMIT_S)
    assert second.returncode == 0, rest
    before = what_drivers_write(path.parent / "run")
    os.kill(first.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=_LIMIT_S)
    assert first.returncode == 1, output
    assert (
        "its file is gone (another driver took over and has ended, or somebody removed it); nothing more is written" in output
    )
    assert what_drivers_write(path.parent / "run") == before


def test_a_driver_that_slept_while_nobody_came_goes_on(run_file: RunFile, undisturbed: dict[str, dict[str, str]]) -> None:
    path = run_file(LOCAL)
    first = stopped(path, "--executor", "local")
    os.kill(first.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=_LIMIT_S)
    assert first.returncode == 0, output
    assert results_of(path) == undisturbed


def test_a_driver_of_a_cluster_that_was_replaced_ends_its_workers(
    cluster: Cluster, run_file: RunFile, undisturbed: dict[str, dict[str, str]]
) -> None:
    """Its workers hold all GPUs: the successor gets them only when it has ended, in the middle of their units."""
    path = run_file({})
    first = stopped(path, "--address", cluster.address)
    second = start(path, "--address", cluster.address, module="tests.cluster.quick_driver")
    until = time.monotonic() + _LIMIT_S
    while number_of(path, "run begins") < 2 and second.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.03)
    os.kill(first.pid, signal.SIGCONT)
    output, _ = first.communicate(timeout=_LIMIT_S)
    rest, _ = second.communicate(timeout=_LIMIT_S)
    assert first.returncode == 1, output
    assert f"lost the lock of {path.parent / 'run'} to host {socket.gethostname()}, pid {second.pid}, since" in output
    assert "Traceback" not in output
    assert second.returncode == 0, rest
    assert results_of(path) == undisturbed
