"""One Ray cluster for the files of this folder: two CPUs, two pretended GPUs, which schedule like real ones."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from pipeline.executors.ray import RayExecutor
from stages.contracts.settings import Resources
from tests.forked_cluster import forked_cluster


@pytest.fixture(scope="package")  # a test elsewhere, which the same process runs later, must not find itself connected
def cluster(forks: None) -> Iterator[None]:
    """Its workers are forks."""
    with forked_cluster(num_cpus=2, num_gpus=2) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


@pytest.fixture
def on_ray(cluster: None) -> Callable[..., Callable[[], RayExecutor]]:
    """Makes the maker of an executor with these resources, which stays connected to that cluster."""

    class Staying(RayExecutor):
        def disconnect(self) -> None:
            pass

    def make(**resources: Any) -> Callable[[], RayExecutor]:
        return lambda: Staying(Resources(**resources))

    return make
