"""A run on a cluster that has no node yet, as `ray up` and KubeRay leave it when nothing runs."""

import re
from pathlib import Path

import pytest
import yaml

from tests.deploy.example_run import RUN, SMALL, assert_complete
from tests.deploy.ray_head import ray_head

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_an_empty_cluster_grows_what_a_run_needs(clone: Path, tmp_path: Path) -> None:
    """The node types of cluster.yaml, each of the size that this machine can play, with a GPU that is none."""
    node_types = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())["available_node_types"]
    for name, num_gpus in (("gpu_worker", 1), ("cpu_worker", 0)):
        node_types[name] |= {"max_workers": 1, "resources": {"CPU": 1, "GPU": num_gpus, "object_store_memory": 100_000_000}}
    with ray_head(node_types=node_types) as head:
        settings = ("--set", f"run_dir={tmp_path / 'run'}", "--set", "resources.num_gpus=1", "--set", "resources.num_workers=1")
        submission = head.submit(*RUN, *SMALL, *settings, working_dir=clone)
        (log,) = head.temp_dir.glob("ray/session_2*/logs/monitor.log")
        decisions = log.read_text()
    assert (submission.exit_code, submission.status) == (0, "SUCCEEDED"), submission.log
    assert_complete(tmp_path / "run")
    assert {"cpu_worker", "gpu_worker"} <= set(re.findall(r"(\w+_worker), uninitialized", decisions))  # its list of nodes
