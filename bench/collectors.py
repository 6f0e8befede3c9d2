"""Benchmark 7: what each collector beyond the default ones costs. Run in a process of its own.

Calibrate without further collectors and with each of them, in turn: a token shard's way through all layers, and the units that
finish the layers' sums.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench.compute import Opened
from bench.measure import print_measured, timed
from stages.calibrate.collectors.registry import FURTHER
from stages.calibrate.spec import ReduceArgs
from stages.calibrate.units import calibrate_unit, reduce_unit
from stages.contracts.paths import column_file
from stages.contracts.texts import DomainShards
from stages.contracts.units import HeldJob

MOST_SEQUENCES = 8
"""A ratio of passes needs fewer tokens than the models have."""


def measure(name: str, folder: Path, num_threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of calibrate by collector ("" for none), and the bytes of the collector's own evidence of all layers."""
    wall_s: dict[str, list[float]] = {}
    cpu_s: dict[str, list[float]] = {}
    num_bytes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        opened = Opened.of(name, folder, num_threads, Path(temporary), MOST_SEQUENCES)

        def gather(collectors: tuple[str, ...]) -> None:
            job = opened.job(collectors)
            calibrate_unit(job)
            for layer in opened.survey.moe_layers:
                args = ReduceArgs(layer, (DomainShards("", 0, 1),), is_sampled=False, collectors=collectors)
                reduce_unit(HeldJob(job.run_dir, job.part_dir, args, opened.shard))

        gather(())  # warms up
        for _ in range(repeats):
            for collector in ("", *FURTHER):
                seconds = timed(partial(gather, (collector,) if collector else ()))
                wall_s.setdefault(collector, []).append(seconds[0])
                cpu_s.setdefault(collector, []).append(seconds[1])
                if collector:
                    paths = [
                        column_file(opened.run_dir / "calibrate", layer, column.name)
                        for layer in opened.survey.moe_layers
                        for column in FURTHER[collector].columns
                    ]
                    num_bytes[collector] = sum(path.stat().st_size for path in paths)
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "evidence_bytes": num_bytes,
        "num_layers": len(opened.survey.moe_layers),
        "num_tokens": opened.place.num_tokens,
    }


if __name__ == "__main__":
    print_measured(measure)
