"""Benchmark 8: what recombine costs, as a multiple of calibrate. Run in a process of its own.

One run with a variant of each kind, unit after unit in this process: seconds of calibrate, which serves all variants, and of
each target's part of recombine, loading of layers included, in turn.
"""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.measure import print_run_measured, run_unit, timed
from pipeline.checks import check
from pipeline.config import load_config
from pipeline.driver.worker import Worker
from pipeline.run.view import RunView
from stages.contracts.units import Unit


def _seconds(worker: Worker, units: list[Unit]) -> tuple[float, float, dict[str, float]]:
    """Wall and processor seconds of some units, and processor seconds by kind of unit."""
    wall_s, cpu_s, kinds = 0.0, 0.0, defaultdict[str, float](float)

    for unit in units:
        wall, cpu = timed(lambda unit=unit: run_unit(worker, unit))  # type: ignore[misc]
        wall_s, cpu_s = wall_s + wall, cpu_s + cpu
        kinds[unit.call.function.rpartition(":")[2]] += cpu
    worker.close()
    return wall_s, cpu_s, dict(kinds)


def measure(run_file: Path, repeats: int) -> dict[str, Any]:
    """Seconds of calibrate and of recombine by part, and their ratios, by processor seconds."""
    config = load_config(run_file, [])
    view = RunView(config, check(config).inputs, num_workers=1)
    worker = Worker()
    _seconds(worker, list(view.units("prepare")))
    view = RunView(config, check(config).inputs, num_workers=1)
    found: dict[str, Any] = {"calibrate": [], "parts": defaultdict(list), "ratio": defaultdict(list)}
    for _ in range(repeats):
        for part in [*view.parts("calibrate"), *view.parts("cluster"), *view.parts("recombine")]:
            shutil.rmtree(view.run_dir / part.dir, ignore_errors=True)
        calibrate = _seconds(worker, list(view.units("calibrate")))
        _seconds(worker, list(view.units("cluster")))
        parts = {}
        for part in view.parts("recombine"):
            parts[part.name] = _seconds(worker, [unit for unit in view.units("recombine") if unit.part_dir == part.dir])
        found["calibrate"].append(calibrate)
        for name, seconds in parts.items():
            found["parts"][name].append(seconds)
            found["ratio"][name].append(seconds[1] / calibrate[1])
    return found


if __name__ == "__main__":
    print_run_measured(measure)
