"""A longer, randomised campaign: `python -m tests.cluster.campaign --seed 1 --runs 20`, or `make chaos`.

On a cluster of several raylets on this machine, worker processes, whole nodes and the driver are killed at random moments of
each run; a killed driver's command is given again. In one run more, the driver computes by itself and is killed. Every run has
to finish with the bytes of an undisturbed local run.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from tests import HOME
from tests.cluster.conftest import NUM_LAYERS, SETTINGS, results_of
from tests.cluster.test_driver import events_of
from tests.conftest import REPOSITORY
from tests.forked_cluster import add_node
from tests.runs import FinishedRun, write_run_file
from tests.tiny import save_checkpoint, save_token_ids

NUM_NODES = 2
FAULTS = {"worker": 6, "node": 2, "driver": 2}
"""How often each is chosen, of ten."""
_MAX_FAULTS = 6
_MAX_LOCAL_FAULTS = 20
_PAUSE_S = (0.2, 6.0)
_LIMIT_S = 600
_MAX_WAIT_S = 120
_AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
# Deaths of workers that have nothing to do with the unit must not use its attempts up.
MORE_SETTINGS = {"resources.max_attempts": 20, "resources.layers_per_shard": 1, "resources.num_workers": NUM_NODES}


@dataclass
class RunRecord:
    """What was done to a run, and what became of it. num_repeated: how often a unit was begun again."""

    faults: Counter[str] = field(default_factory=Counter)
    is_finished: bool = False
    is_equal: bool = False
    num_units: int = 0
    num_repeated: int = 0
    num_sealed_twice: int = 0
    elapsed_s: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.is_finished and self.is_equal and not self.num_sealed_twice


def worker_pids(cluster: Cluster) -> list[int]:
    """Processes in which units of this cluster run (or will): children of its raylets."""
    assert cluster.head_node is not None
    session = str(cluster.head_node.get_session_dir_path()).encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if title.startswith(b"ray::") and not title.startswith(_AGENTS):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if session in Path(f"/proc/{parent}/cmdline").read_bytes():
                    found.append(int(entry.name))
    return sorted(found)


class Disturbed:
    """One run and its driver, which is started again when it is killed. cluster: None where the driver computes by itself."""

    def __init__(self, cluster: Cluster | None, path: Path, rng: random.Random) -> None:
        self._cluster, self._path, self._rng = cluster, path, rng
        self.record = RunRecord()
        self._driver = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        where = ["--address", self._cluster.address] if self._cluster else ["--executor", "local"]
        command = [sys.executable, "-m", "pipeline", "run", str(self._path), *where]
        with open(self._path.with_name("driver.log"), "ab") as log:
            return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)

    def go(self, expected: dict[str, dict[str, str]]) -> RunRecord:
        """Disturb the run until it is over, or was disturbed enough; then let it finish."""
        started = time.monotonic()
        self._wait_for_first_unit()
        max_faults = _MAX_FAULTS if self._cluster else _MAX_LOCAL_FAULTS
        while self._driver.poll() is None and self.record.faults.total() < max_faults:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._driver.wait(self._rng.uniform(*_PAUSE_S))
                break
            if self._cluster is None:
                self._strike_driver()
            else:
                self._strike(self._rng.choices(list(FAULTS), list(FAULTS.values()))[0], self._cluster)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._driver.wait(_LIMIT_S)
        self.end()
        record = self.record
        record.elapsed_s = time.monotonic() - started
        record.is_finished = self._driver.returncode == 0
        record.is_equal = record.is_finished and results_of(self._path) == expected
        begun = Counter(event["unit"] for event in events_of(self._path) if event["event"] == "started")
        sealed = Counter(event["unit"] for event in events_of(self._path) if event["event"] == "sealed")
        record.num_units, record.num_repeated = len(begun), begun.total() - len(begun)
        record.num_sealed_twice = sealed.total() - len(sealed)
        return record

    def _wait_for_first_unit(self) -> None:
        deadline = time.monotonic() + _MAX_WAIT_S
        while time.monotonic() < deadline and self._driver.poll() is None and not events_of(self._path):
            time.sleep(0.1)

    def _strike(self, fault: str, cluster: Cluster) -> None:
        if fault == "driver":
            return self._strike_driver()
        if fault == "worker":
            pids = worker_pids(cluster)
            if not pids:
                return None
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(pids), signal.SIGKILL)
        else:
            nodes = sorted(cluster.worker_nodes, key=lambda node: node.unique_id)
            cluster.remove_node(self._rng.choice(nodes), allow_graceful=False)
            add_node(cluster)
        self.record.faults[fault] += 1
        return None

    def _strike_driver(self) -> None:
        self._driver.kill()
        self._driver.wait(_MAX_WAIT_S)
        self._driver = self._start()
        self.record.faults["driver"] += 1

    def end(self) -> None:
        """Kill the driver if it is still there."""
        if self._driver.poll() is None:
            self._driver.kill()
            self._driver.wait(_MAX_WAIT_S)


@contextlib.contextmanager
def _cluster() -> Iterator[Cluster]:
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(NUM_NODES):
            add_node(cluster)
        yield cluster
    finally:
        cluster.shutdown()


def _faults(record: RunRecord) -> str:
    return ", ".join(f"{count} {fault}" for fault, count in sorted(record.faults.items())) or "none"


def _table(records: Sequence[RunRecord]) -> Table:
    table = Table("run", "faults injected", "finished", "bytes equal", "units", "begun again", "sealed twice", "seconds")
    for number, one in enumerate(records):
        answers = ("yes" if one.is_finished else "NO", "yes" if one.is_equal else "NO")
        counts = (one.num_units, one.num_repeated, one.num_sealed_twice)
        table.add_row(str(number), _faults(one), *answers, *map(str, counts), f"{one.elapsed_s:.0f}")
    return table


def campaign(seed: int, num_runs: int, folder: Path, console: Console) -> list[RunRecord]:
    """Disturb runs, one after another; each has random numbers of its own, so that one can be repeated alone."""
    torch.set_num_threads(1)  # as a worker computes
    model = save_checkpoint(folder / "tiny-mixtral-8", "mixtral", max_shard_size="300KB", num_hidden_layers=NUM_LAYERS)
    ids = save_token_ids(folder / "ids.npy")
    settings = {**SETTINGS, **MORE_SETTINGS}
    expected = FinishedRun.of(write_run_file(folder / "undisturbed", model, ids, settings)).results()
    records: list[RunRecord] = []

    def disturb(cluster: Cluster | None, more: dict[str, Any]) -> None:
        number = len(records)
        path = write_run_file(folder / f"run-{number}", model, ids, settings | more)
        run = Disturbed(cluster, path, random.Random(f"{seed} {number}"))
        try:
            records.append(run.go(expected))
        finally:
            run.end()
        console.print(f"run {number}: {_faults(records[-1])}; finished: {records[-1].is_finished}", highlight=False)

    with _cluster() as cluster:
        for _ in range(num_runs):
            disturb(cluster, {})
    disturb(None, {"resources.num_gpus": None, "resources.num_workers": None})
    return records


def main() -> int:
    """Exit code 1 if a run did not finish with the same bytes; its folder is kept then."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and faults")
    parser.add_argument("--runs", type=int, default=10, help="how many runs on the cluster are disturbed")
    options = parser.parse_args()
    console = Console(width=140)
    folder = Path(tempfile.mkdtemp(prefix="hcsmoe-chaos-"))
    try:
        records = campaign(options.seed, options.runs, folder, console)
    finally:
        shutil.rmtree(HOME, ignore_errors=True)
    console.print(_table(records))
    if not all(record.is_good for record in records):
        console.print(f"logs and run directories are kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
