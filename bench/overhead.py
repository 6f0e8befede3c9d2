"""Benchmark 6, in a process of its own: what a unit costs that does nothing."""

import argparse
import json
import tempfile
import time
from pathlib import Path

from pipeline.executors.base import Executor
from pipeline.executors.local import LocalExecutor
from pipeline.executors.ray import RayExecutor, connect
from stages.contracts.settings import Resources
from stages.contracts.units import Job, NoFacts, Unit, UnitCall, UnitResult

NOTHING = UnitCall("bench.overhead:nothing_unit", NoFacts, NoFacts)


def nothing_unit(_job: Job[NoFacts]) -> UnitResult[NoFacts]:
    """Do nothing; sealing it writes a manifest."""
    return UnitResult(NoFacts())


def seconds_a_unit(executor: Executor, folder: Path, num_units: int) -> float:
    """Wall seconds of one empty unit, sealed, one after another through one worker."""
    units = [
        Unit(str(folder), "nothing", "nothing", f"unit-{i}", NOTHING.on(NoFacts()), f"{i}", on_worker=True)
        for i in range(num_units + 1)
    ]
    executor.want(units)
    started = 0.0
    for number, unit in enumerate(units):
        while not (slots := [slot for slot in executor.free_slots() if slot.is_worker]):
            executor.wait(0.05)
        executor.submit(slots[0], unit)
        while not (ended := executor.wait(1.0)):
            pass
        assert ended[0][2].failure is None, ended[0][2].failure
        if number == 0:  # the first imports
            started = time.perf_counter()
    return (time.perf_counter() - started) / num_units


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--units", type=int, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        local_s = seconds_a_unit(LocalExecutor(), Path(folder) / "local", args.units)
        connect("local")
        executor = RayExecutor(Resources(num_workers=1, num_gpus=0))
        ray_s = seconds_a_unit(executor, Path(folder) / "ray", args.units)
        executor.close()
        executor.disconnect()
    print(json.dumps({"local_unit_s": local_s, "ray_unit_s": ray_s}))


if __name__ == "__main__":
    main()
