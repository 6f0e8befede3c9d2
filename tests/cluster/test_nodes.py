"""Nodes that vanish with their GPU, and nodes that join while a run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.config import load_config
from pipeline.driver.outcome import Outcome
from pipeline.executors.base import Slot
from pipeline.executors.ray import connect
from stages.contracts.settings import RunConfig
from stages.contracts.units import Unit
from tests.cluster.faults import FaultyExecutor
from tests.forked_cluster import add_node
from tests.runs import FinishedRun, execute

pytestmark = pytest.mark.slow

STRUCK = {
    "calibrate/layers-0002-0004/tokens-0001": "on a node to be killed",
    "merge/model-00001-of-*": "on a node to be killed",
}


class NodeKiller(FaultyExecutor):
    """Kills the whole node on which a struck unit runs; the second node to be killed is replaced by one that joins before."""

    def __init__(self, config: RunConfig, cluster: Cluster, marker_dir: Path) -> None:
        super().__init__(config.resources, STRUCK, marker_dir)
        self._cluster = cluster
        self.killed: list[str] = []
        self.joined = ""

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """Kill the node that a struck unit has named."""
        for marker in self._marker_dir.iterdir():
            node_id = marker.read_text()
            if node_id and node_id not in self.killed:
                (node,) = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
                self._cluster.remove_node(node, allow_graceful=False)
                self.killed.append(node_id)
                if not self.joined:
                    self.joined = add_node(self._cluster).node_id
        return super().wait(timeout_s)


def test_a_run_finishes_on_what_is_left_and_on_what_joins(
    cluster: Cluster, run_file: Callable[[dict[str, Any]], Path], undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """A node dies in calibrate, one joins, another dies in merge: the finished bytes are those of a local run."""
    path = run_file({})
    config = load_config(path, [])
    cluster.wait_for_nodes()
    executors: list[NodeKiller] = []

    def make_executor() -> NodeKiller:
        connect(cluster.address)
        executors.append(NodeKiller(config, cluster, tmp_path))
        return executors[0]

    try:
        result, _ = execute(config, make_executor)
    finally:
        while len(cluster.worker_nodes) < 2:  # as the other tests expect the cluster
            add_node(cluster)
    (executor,) = executors
    assert len(executor.killed) == 2
    assert executor.joined
    assert FinishedRun.found(path, config, result.report).results() == undisturbed
    assert not ray.is_initialized()
