"""Benchmark 3: merge and assemble of a finished run against a plain copy of as many bytes. Run in a process of its own.

Both read the source's weight files, dropped from the page cache before, and write as many bytes as the target has, each file
flushed to the disk; they take turns.
"""

import os
import shutil
from pathlib import Path
from typing import Any

from bench.measure import forget_pages, print_run_measured, run_unit, timed
from pipeline.checks import check
from pipeline.config import load_config
from pipeline.driver.worker import Worker
from pipeline.run.view import RunView

_CHUNK_BYTES = 1 << 24


def copy(source: Path, target: Path, num_bytes: int) -> None:
    """Read all weight files of a folder; write the first num_bytes of them as one flushed file."""
    target.mkdir(parents=True)
    left = num_bytes
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with open(target / "copy", "wb", buffering=0) as out:
        for path in sorted(source.glob("*.safetensors")):
            with open(path, "rb", buffering=0) as raw:
                while size := raw.readinto(buffer):
                    out.write(buffer[: min(size, left)])
                    left -= min(size, left)
        os.fsync(out.fileno())
    assert not left


def measure(run_file: Path, repeats: int) -> dict[str, Any]:
    """Bytes and seconds of merge and assemble and of the copy, and the share of its rate that is reached."""
    config = load_config(run_file, [])
    view = RunView(config, check(config).inputs)
    run_dir, model = Path(config.run_dir), view.model
    merge, assemble = view.units("merge"), view.units("assemble")
    merged = run_dir / merge[0].part_dir / "checkpoint"
    written = sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    read = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    worker, bare = Worker(), run_dir / "copy"
    found: dict[str, list[float]] = {"unit_s": [], "unit_cpu_s": [], "copy_s": [], "share": []}

    def run_units() -> None:
        for unit in (*merge, *assemble):
            run_unit(worker, unit)

    for number in range(repeats + 1):
        shutil.rmtree(run_dir / assemble[0].part_dir)
        shutil.rmtree(merged)
        shutil.rmtree(bare, ignore_errors=True)
        os.sync()
        forget_pages(model)
        unit_s, unit_cpu_s = timed(run_units)
        os.sync()
        forget_pages(model)
        copy_s, _ = timed(lambda: copy(model, bare, written))
        if number:  # the first pass imports
            found["unit_s"].append(unit_s)
            found["unit_cpu_s"].append(unit_cpu_s)
            found["copy_s"].append(copy_s)
            found["share"].append(copy_s / unit_s)
    shutil.rmtree(bare)
    return {"read_bytes": read, "written_bytes": written, **found}


if __name__ == "__main__":
    print_run_measured(measure)
