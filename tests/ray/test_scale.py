"""Twenty thousand units: what one more costs the driver, in time and in memory."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.drive import Driver
from pipeline.executors.base import Executor
from pipeline.units import Outcome, Unit
from stages.common.unit import Job, UnitResult
from tests.pipeline.fake import ToyRun, at, unit

WARM_UP = 5_000
MAX_CPU_S = 0.005
MAX_GROWTH_BYTES = 20_000_000


def nothing(job: Job) -> UnitResult:
    return UnitResult()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class CountingRun(ToyRun):
    """Keeps nothing of a unit that is done, and looks at this process after the warm-up."""

    num_done = 0
    after_warm_up = 0

    def done(self, unit: Unit, outcome: Outcome) -> None:
        self.num_done += 1
        if self.num_done == WARM_UP:
            self.after_warm_up = resident_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("num_gpus", "num_units"), [(1, 20_000), (0, 10_000)], ids=["tasks", "workers"])
def test_one_more_unit_costs_the_driver_little_time_and_no_memory(
    tmp_path: Path, on_ray: Callable[..., Callable[[], Executor]], num_gpus: int, num_units: int
) -> None:
    """CPU time of this process with all its threads, Ray's included. Without GPUs, workers do what tasks do with them."""
    units = at(tmp_path, [unit(f"{n:05d}", call="tests.ray.test_scale:nothing") for n in range(num_units)])
    run = CountingRun(units, tmp_path)
    executor = on_ray(num_gpus=num_gpus)()
    started, cpu = time.monotonic(), time.process_time()
    try:
        Driver([run], executor, print).drive()
    finally:
        executor.close()
    elapsed_s, cpu_s = time.monotonic() - started, (time.process_time() - cpu) / num_units
    growth_bytes = resident_bytes() - run.after_warm_up
    print(f"{elapsed_s:.1f} s; driver {cpu_s * 1e3:.2f} ms of CPU a unit, {growth_bytes / 1e6:+.1f} MB")
    assert (run.failures, run.num_done) == ([], num_units)
    assert cpu_s < MAX_CPU_S
    assert growth_bytes < MAX_GROWTH_BYTES
    assert len(units) == num_units  # kept to here, so that units let go of hide no growth
