"""Killed workers and killed drivers of runs on object storage: the bytes are those of an undisturbed local run."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.config import load_config
from pipeline.executors.ray import connect
from stages.io.storage import as_path
from tests.cluster.faults import FaultyExecutor
from tests.cluster.test_driver import start
from tests.forked_cluster import forked_cluster
from tests.forks import Fork
from tests.runs import FinishedRun, execute
from tests.storage.conftest import SECRET, results_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forks")]
RunFile = Callable[[dict[str, Any]], Path]
_LIMIT_S = 600
STRUCK_STAGES = ("calibrate", "merge", "evaluate")  # tests/cluster has all
# Between the last write and the seal: what the store then holds is what tests/cluster cannot show.
KILLS = {
    "calibrate/layers-0002-0004/tokens-0001": "kill before seal",
    "calibrate/layer-0003": "kill before seal",
    "merge/model-00002-of-*": "kill before seal",
    "assemble/checkpoint": "kill before seal",
}


@pytest.fixture
def cluster(s3: str) -> Iterator[Cluster]:
    """One node with a fake GPU, whose workers find the store by its environment."""
    with forked_cluster(num_cpus=2, num_gpus=1) as cluster:
        yield cluster


@pytest.mark.timeout(1000)
def test_killed_workers_lose_nothing(
    cluster: Cluster, remote_run_file: RunFile, undisturbed: FinishedRun, tmp_path: Path
) -> None:
    path = remote_run_file({"resources.num_gpus": 0.5})
    config = load_config(path, [])
    (tmp_path / "markers").mkdir()

    def make_executor() -> FaultyExecutor:
        connect(cluster.address)
        return FaultyExecutor(config.resources, KILLS, tmp_path / "markers")

    result, recorder = execute(config, make_executor)
    assert len(list((tmp_path / "markers").iterdir())) == len(KILLS), "every fault struck"
    assert len(recorder.units) == len({unit.id for unit in recorder.units}), "no unit was sealed twice"
    assert results_of(FinishedRun.found(path, config, result.report)) == results_of(undisturbed)


def manifests(run_dir: Path, stage: str = "") -> dict[str, bytes]:
    """Every manifest, of a stage or of all, as it is now."""
    return {str(path): path.read_bytes() for path in run_dir.glob(f"{stage}*/manifests/**/*.json")}


def _wait_for_more(run_dir: Path, stage: str, process: Fork) -> None:
    """Wait until one more unit of a stage is sealed, or the driver has ended."""
    already, deadline = len(manifests(run_dir, stage)), time.monotonic() + _LIMIT_S
    while process.poll() is None and len(list(run_dir.glob(f"{stage}*/manifests/**/*.json"))) <= already:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(1300)
def test_a_driver_killed_in_several_stages_repeats_no_sealed_unit(remote_run_file: RunFile, undisturbed: FinishedRun) -> None:
    """The driver computes too (local executor), so units die with it. A unit that ran again would have another manifest."""
    path = remote_run_file({"resources.layers_per_shard": 1})
    config = load_config(path, [])
    run_dir = as_path(config.run_dir)
    sealed: dict[str, bytes] = {}
    for number, stage in enumerate(STRUCK_STAGES):
        process = start(path, "--executor", "local")
        _wait_for_more(run_dir, stage, process)
        time.sleep(0.1 * number)  # into the units that follow, each time further
        assert process.poll() is None, "each kill strikes a running driver"
        process.kill()
        process.communicate(timeout=_LIMIT_S)
        sealed = manifests(run_dir)
    process = start(path, "--executor", "local")
    output, _ = process.communicate(timeout=_LIMIT_S)
    assert process.returncode == 0, output
    assert "took over the stale lock" in output
    assert SECRET not in output
    found = manifests(run_dir)
    assert {name: content for name, content in found.items() if name in sealed} == sealed, "no sealed unit ran twice"
    done = FinishedRun.found(path, config, {})
    assert results_of(done) == results_of(undisturbed)
    assert not [path for path in run_dir.rglob("*") if SECRET.encode() in (path.read_bytes() if path.is_file() else b"")]
