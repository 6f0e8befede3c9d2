"""Thousands of units: what one more costs the driver, in time and in memory."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import ray

from pipeline.driver.loop import Driver
from pipeline.driver.outcome import Outcome
from pipeline.executors.ray import RayExecutor
from stages.contracts.settings import Resources
from stages.contracts.units import Job, NoFacts, Unit, UnitResult
from tests.pipeline.fake import ToyRun, at, unit

REPOSITORY = Path(__file__).parents[2]
NUM_UNITS = 6_000
WINDOW = 250
LIMIT_S = 600  # a slow processor that two other tests use as well
MAX_CPU_S = 0.005
MAX_GROWTH_BYTES = 500  # a unit


def nothing(job: Job[object]) -> UnitResult[NoFacts]:
    return UnitResult(NoFacts())


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class CountingRun(ToyRun):
    """Keeps nothing of a unit that is done, and looks at this process after every so many."""

    def __init__(self, units: Sequence[Unit], run_dir: Path) -> None:
        super().__init__(units, run_dir)
        self.num_done = 0
        self.resident: list[int] = []

    def done(self, unit: Unit, outcome: Outcome) -> None:
        self.num_done += 1
        self.count_done()
        if self.num_done % WINDOW == 0:
            self.resident.append(resident_bytes())

    def growth_bytes(self) -> float:
        """Bytes a unit: the median over windows. Ray's own pools grow by megabytes, now and then; a leak, all the time."""
        return statistics.median(after - before for before, after in pairwise(self.resident)) / WINDOW


def measure(num_gpus: int, num_units: int, folder: Path) -> dict[str, float]:
    """CPU seconds a unit of this process with all its threads, Ray's included, and its growth a unit."""
    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=100_000_000,
        log_to_driver=False, logging_level="error",
    )  # fmt: skip
    units = at(folder, [unit(f"{n:05d}", call="tests.ray.test_scale:nothing") for n in range(num_units)])
    run = CountingRun(units, folder)
    executor = RayExecutor(Resources(num_gpus=num_gpus))
    cpu = time.process_time()
    try:
        Driver([run], executor, print).drive()
    finally:
        executor.close()
    found = {
        "num_done": run.num_done - len(run.failures),
        "cpu_s": (time.process_time() - cpu) / num_units,
        "growth_bytes": run.growth_bytes(),
    }
    ray.shutdown()
    assert len(units) == num_units  # kept to here, so that units that are freed hide no growth
    return found


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("num_gpus", [1, 0], ids=["tasks", "workers"])
def test_one_more_unit_costs_the_driver_little_time_and_no_memory(tmp_path: Path, num_gpus: int) -> None:
    """In a process of its own: what other tests have left in this one would count too. Without GPUs, workers do what tasks do
    with them."""
    command = [sys.executable, "-m", "tests.ray.test_scale", str(num_gpus), str(NUM_UNITS), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"driver {found['cpu_s'] * 1e3:.2f} ms of CPU a unit, {found['growth_bytes']:+.0f} bytes")
    assert found["num_done"] == NUM_UNITS
    assert found["cpu_s"] < MAX_CPU_S
    assert found["growth_bytes"] < MAX_GROWTH_BYTES


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
