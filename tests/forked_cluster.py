"""Ray clusters on this machine whose workers are forks (`tests.forks`)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.conftest import REPOSITORY
from tests.forks import WORKER

_NODE: dict[str, Any] = {"object_store_memory": 80_000_000, "setup_worker_path": str(WORKER)}


@contextlib.contextmanager
def forked_cluster(num_cpus: int, num_gpus: int) -> Iterator[Cluster]:
    """Start a head with so many CPUs and GPUs, which it pretends to have and which schedule like real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))  # raylets inherit it: workers import the tests' own units
        head = {"num_cpus": num_cpus, "num_gpus": num_gpus, "include_dashboard": False, "include_log_monitor": False, **_NODE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def add_node(cluster: Cluster) -> Any:
    """Add a node with one GPU and room for one CPU task beside its worker."""
    return cluster.add_node(num_cpus=2, num_gpus=1, **_NODE)
