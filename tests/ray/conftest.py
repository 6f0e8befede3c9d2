"""One Ray cluster for the session: two CPUs, two pretended GPUs, which schedule like real ones."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from pipeline.executors.ray import RayExecutor
from stages.contracts.settings import Resources


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="hr-")  # short: the paths of Ray's sockets may have 107 bytes
    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=100_000_000, _temp_dir=folder,
        log_to_driver=False, logging_level=logging.ERROR,
    )  # fmt: skip
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def on_ray(cluster: None) -> Callable[..., Callable[[], RayExecutor]]:
    """Makes the maker of an executor with these resources, which stays connected to the session's cluster."""

    class Staying(RayExecutor):
        def disconnect(self) -> None:
            pass

    def make(**resources: Any) -> Callable[[], RayExecutor]:
        return lambda: Staying(Resources(**resources))

    return make
