"""Time, processor seconds and peak memory of processes, taken from outside by what the kernel keeps of them."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from pipeline.driver.worker import Worker
from stages.contracts.units import Unit

MARK = "HCSMOE_BENCHMARK"
REPOSITORY = Path(__file__).parents[1]
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class Measured:
    """One command: wall and processor seconds, peak resident bytes of its main process, last line of its output.

    Peaks count pages of mapped files, and are read 20 times a second. peaks: where all processes were watched, that of each of
    the others by all its titles.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    output: str
    peaks: Mapping[str, int] = field(default_factory=dict)


def _peak_bytes(pid: int) -> int:
    """The kernel's high-water mark of a process's resident memory, which psutil does not read."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class _Watch(threading.Thread):
    """Reads the high-water mark of a process while it lives and, if asked, of every process that carries a mark in its
    environment, wherever it was started from.

    (What `wait4` tells of a process would do for one, were it not at least what its parent had when it started it.)
    """

    def __init__(self, pid: int, mark: str | None) -> None:
        super().__init__(daemon=True)
        self._pid, self._mark = pid, mark
        self._marked: dict[int, bool] = {pid: True}
        self._over = threading.Event()
        self._titles: dict[int, set[str]] = {}
        self._peaks: dict[int, int] = {pid: 0}

    def run(self) -> None:
        while True:
            for pid in psutil.pids() if self._mark else (self._pid,):
                with contextlib.suppress(psutil.Error, OSError):
                    self._look(psutil.Process(pid))
            if self._over.wait(_SAMPLE_S):
                return

    def _look(self, process: psutil.Process) -> None:
        pid = process.pid
        if pid not in self._marked:
            self._marked[pid] = process.environ().get(MARK) == self._mark
        if self._marked[pid]:
            self._titles.setdefault(pid, set()).add(" ".join(process.cmdline()).strip()[:100])
            self._peaks[pid] = max(_peak_bytes(pid), self._peaks.get(pid, 0))

    def stop(self) -> tuple[int, dict[str, int]]:
        """Peak of the process; and of each of the others under all titles that it has had."""
        self._over.set()
        self.join()
        main = self._peaks.pop(self._pid)
        return main, {f"{pid}: {' | '.join(sorted(self._titles[pid]))}": peak for pid, peak in self._peaks.items()}


def run(command: Sequence[str], watch_all: bool = False, **environment: str) -> Measured:
    """Run a command to its end in the repository. Raises RuntimeError with its output when it fails.

    watch_all: look at every process that it starts, however far removed; costs a little processor time.
    """
    mark = uuid.uuid4().hex
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment, MARK: mark}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watch = _Watch(process.pid, mark if watch_all else None)
    watch.start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    peak_bytes, peaks = watch.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output}")
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return Measured(wall_s, usage.ru_utime + usage.ru_stime, peak_bytes, last, peaks)


def forget_pages(folder: Path) -> None:
    """Let the kernel drop its cache of a folder's files, so that reading them reads the disk."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def run_unit(worker: Worker, unit: Unit) -> None:
    """Run a unit in this process. Raises RuntimeError with the reason if it fails."""
    outcome = worker.run(unit)
    if outcome.failure:
        raise RuntimeError(f"{unit.label}: {outcome.failure.message}\n{outcome.failure.detail}")


def print_measured(measure: Callable[[str, Path, int, int], dict[str, Any]]) -> None:
    """The command of a benchmark that has a process of its own: print what it measures as one line of JSON. measure: given the
    model's name, its folder, threads and repeats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    print(json.dumps(measure(args.name, args.folder, args.threads, args.repeats)))


def print_run_measured(measure: Callable[[Path, int], dict[str, Any]]) -> None:
    """As `print_measured`, for a benchmark that is given a run file and repeats."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--repeats", type=int, required=True)
    args = parser.parse_args()
    print(json.dumps(measure(args.run_file, args.repeats)))


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import torch
    import transformers

    cpu = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "unknown")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip(),
        "cpu": model,
        "num_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "bf16": next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpu), "no bf16 instructions"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg()[0],
    }
