"""Thousands of units: what one more costs the driver, in time and in memory."""

import gc
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
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
NUM_UNITS = 4_000
LIMIT_S = 600  # a slow processor that two other tests use as well
MAX_CPU_S = 0.005
MAX_GROWTH_BYTES = 500  # a unit; 192 are the dictionaries that pickling makes of three dataclasses of a unit


def nothing(job: Job[object]) -> UnitResult[NoFacts]:
    return UnitResult(NoFacts())


def traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


class CountingRun(ToyRun):
    """Keeps nothing of a unit that is done. CPU is measured over the first half of the units; memory over the rest, since to
    trace it costs time.

    Memory is what Python's allocators gave and did not get back: the resident size also holds the pools of Ray's own threads,
    which grow by megabytes now and then, and more so on a busy machine.
    """

    def __init__(self, units: Sequence[Unit], run_dir: Path) -> None:
        super().__init__(units, run_dir)
        self.num_done = 0
        self.half, self.warm, self.last = len(units) // 2, len(units) * 5 // 8, len(units)
        self.start_s = time.process_time()
        self.cpu_s = 0.0
        self.bytes_when_warm = 0
        self.growth_bytes = 0.0

    def done(self, unit: Unit, outcome: Outcome) -> None:
        self.num_done += 1
        self.count_done()
        if self.num_done == self.half:
            self.cpu_s = (time.process_time() - self.start_s) / self.half
            tracemalloc.start()
        elif self.num_done == self.warm:
            self.bytes_when_warm = traced_bytes()
        elif self.num_done == self.last:  # while the driver still is there, with what it keeps
            self.growth_bytes = (traced_bytes() - self.bytes_when_warm) / (self.last - self.warm)


def measure(num_gpus: int, num_units: int, folder: Path) -> dict[str, float]:
    """CPU seconds a unit of this process with all its threads, Ray's included, and its growth a unit."""
    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=100_000_000,
        log_to_driver=False, logging_level="error",
    )  # fmt: skip
    units = at(folder, [unit(f"{n:05d}", call="tests.ray.test_scale:nothing") for n in range(num_units)])
    executor = RayExecutor(Resources(num_gpus=num_gpus))
    run = CountingRun(units, folder)
    try:
        Driver([run], executor, print).drive()
        return {"num_done": run.num_done - len(run.failures), "cpu_s": run.cpu_s, "growth_bytes": run.growth_bytes}
    finally:
        executor.close()
        ray.shutdown()


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
