"""A node that is cut off from the network for a while, as others see it: dead, and then another one."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import results_of
from tests.cluster.hosts import HEAD_PORT, Host, hosts, wait_for_nodes
from tests.cluster.test_driver import events_of
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow
_LIMIT_S = 500


@pytest.fixture
def three_hosts() -> Iterator[list[Host]]:
    """A head that runs no units and two workers with a (fake) GPU each."""
    with hosts(3) as (head, *workers):
        head.start_ray("--head", f"--port={HEAD_PORT}", "--include-dashboard=false", "--num-cpus=0", "--num-gpus=0")
        wait_for_nodes(head, 1)
        for worker in workers:
            _join(worker, head)
        wait_for_nodes(head, 3)
        yield [head, *workers]


def _join(worker: Host, head: Host) -> None:
    worker.start_ray(f"--address={head.address}:{HEAD_PORT}", "--num-cpus=2", "--num-gpus=1")


def _wait(what: str, is_so: Callable[[], bool], driver: subprocess.Popen[str] | None = None) -> None:
    """Wait until it is so; with a driver, only while that runs."""
    deadline = time.monotonic() + _LIMIT_S
    while not is_so():
        assert driver is None or driver.poll() is None, f"the driver ended before {what}:\n{driver.communicate()[0]}"
        assert time.monotonic() < deadline, f"no {what} after {_LIMIT_S} s"
        time.sleep(0.02)


def test_a_node_that_is_cut_off_and_comes_back_costs_only_what_it_ran(
    run_file: Callable[[dict[str, Any]], Path], undisturbed: dict[str, dict[str, str]], three_hosts: list[Host]
) -> None:
    """The node that is first to seal a unit of calibrate is cut off, and healed once the run goes on without it. It is then
    another node: its raylet ends itself, as the cluster has given it up, and is started again, as a supervisor does."""
    head, *workers = three_hosts
    path = run_file({"resources.layers_per_shard": 1, "resources.num_workers": 2})
    address = f"{head.address}:{HEAD_PORT}"
    driver = head.popen([sys.executable, "-m", "pipeline", "run", str(path), "--address", address], REPOSITORY)

    def calibrated() -> list[Host]:
        names = {event["host"] for event in _calibrate(path) if event["event"] == "sealed"}
        return [host for host in workers if host.name in names]

    try:
        _wait("unit of calibrate", lambda: bool(calibrated()), driver)
        struck = calibrated()[0]
        struck.cut_off()
        _wait("lost unit", lambda: any(event["event"] == "lost" for event in events_of(path)), driver)
        struck.heal()
        _wait("end of the raylet that was given up", struck.has_ended)  # the other worker may have done all by then
        _join(struck, head)
        output, _ = driver.communicate(timeout=_LIMIT_S)
    finally:
        driver.kill()
    assert driver.returncode == 0, output
    assert "its node died; trying again on another worker" in output
    assert results_of(path) == undisturbed
    sealed = [event["unit"] for event in events_of(path) if event["event"] == "sealed"]
    assert len(sealed) == len(set(sealed)), "no sealed unit ran twice"


def _calibrate(path: Path) -> list[dict[str, Any]]:
    return [event for event in events_of(path) if event.get("unit", "").startswith("calibrate-")]
