"""A cluster of several raylets on this machine, an eight-layer model, and what an undisturbed local run makes of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.config import load_config
from pipeline.executors.ray import connect
from stages.contracts.settings import RunConfig
from tests.cluster.faults import FaultyExecutor
from tests.forked_cluster import add_node, forked_cluster
from tests.runs import FinishedRun, write_run_file
from tests.tiny import save_checkpoint, save_token_ids

NUM_LAYERS = 8
# Small layer shards and token shards, so that every stage has several units to be struck.
SETTINGS: dict[str, Any] = {
    "calibration.tokens_per_shard": 64,
    "evaluation.tokens_per_shard": 64,
    "resources.layers_per_shard": 2,
    "resources.num_gpus": 1,
    "export.max_file_bytes": "400 kB",
}


@pytest.fixture(scope="session")
def cluster(forks: None) -> Iterator[Cluster]:
    """A head that runs no units and two nodes with one (fake) GPU each. Their workers are forks."""
    with forked_cluster(num_cpus=0, num_gpus=0) as cluster:
        for _ in range(2):
            add_node(cluster)
        yield cluster
        ray.shutdown()


@pytest.fixture(scope="session")
def eight_layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of an eight-layer model over several files, and token ids."""
    folder = tmp_path_factory.mktemp("eight")
    model = save_checkpoint(folder / "tiny-mixtral-8", "mixtral", max_shard_size="300KB", num_hidden_layers=NUM_LAYERS)
    return model, save_token_ids(folder / "ids.npy")


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory, eight_layers: tuple[Path, Path]) -> Callable[[dict[str, Any]], Path]:
    """Make a run file with a run directory of its own."""

    def make(settings: dict[str, Any]) -> Path:
        return write_run_file(tmp_path_factory.mktemp("run"), *eight_layers, {**SETTINGS, **settings})

    return make


@pytest.fixture(scope="session")
def undisturbed(run_file: Callable[[dict[str, Any]], Path]) -> dict[str, dict[str, str]]:
    """Digests of statistics, labels and checkpoints of a local run."""
    return FinishedRun.of(run_file({})).results()


@pytest.fixture
def struck(cluster: Cluster) -> Callable[[RunConfig, dict[str, str], Path], FaultyExecutor]:
    """Connect to the cluster and make an executor whose units are struck by faults; it disconnects when it is closed."""
    cluster.wait_for_nodes()

    def make(config: RunConfig, faults: dict[str, str], marker_dir: Path) -> FaultyExecutor:
        connect(cluster.address)
        return FaultyExecutor(config.resources, faults, marker_dir)

    return make


def results_of(path: Path) -> dict[str, dict[str, str]]:
    """Digests of what another process has finished."""
    return FinishedRun.found(path, load_config(path, []), {}).results()
