"""An S3 server in a process of its own, and a four-layer model uploaded to it."""

import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.io.storage import as_path, file_system
from tests.deploy.ray_head import free_ports
from tests.runs import FinishedRun, write_run_file
from tests.tiny import save_checkpoint, save_token_ids

SECRET = "5ec4e7ba5e64keyf0rt3stsonly00000"
BUCKET = "s3://hcsmoe-tests"
_START_S = 200
NUM_LAYERS = 4
SETTINGS: dict[str, Any] = {
    "calibration.tokens_per_shard": 128,
    "evaluation.tokens_per_shard": 128,
    "resources.layers_per_shard": 2,
    "export.max_file_bytes": "400 kB",
}


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of an empty bucket; this process and those that it starts find the server by their environment."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        try:
            _wait_until_up(port, server)
            system, name = file_system(as_path(BUCKET))
            system.mkdir(name)
            yield BUCKET
        finally:
            server.kill()
            server.wait(30)


def _wait_until_up(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None, "the S3 server has ended"
            assert time.monotonic() < deadline, f"no S3 server after {_START_S} s"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def local_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of a model over several files, and token ids."""
    folder = tmp_path_factory.mktemp("model")
    model = save_checkpoint(folder / "tiny-mixtral", "mixtral", max_shard_size="300KB", num_hidden_layers=NUM_LAYERS)
    return model, save_token_ids(folder / "ids.npy")


@pytest.fixture(scope="session")
def model_url(s3: str, local_model: tuple[Path, Path]) -> str:
    """The same model, uploaded."""
    url = f"{s3}/models/tiny-mixtral"
    for path in local_model[0].iterdir():
        (as_path(url) / path.name).write_bytes(path.read_bytes())
    return url


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, local_model: tuple[Path, Path]) -> FinishedRun:
    """A local run of the model in the local folder."""
    return FinishedRun.of(write_run_file(tmp_path_factory.mktemp("undisturbed"), *local_model, SETTINGS))


@pytest.fixture(scope="session")
def remote_run_file(
    tmp_path_factory: pytest.TempPathFactory, s3: str, model_url: str, local_model: tuple[Path, Path]
) -> Callable[[dict[str, Any]], Path]:
    """Make a run file whose model and run directory are URLs."""

    def make(settings: dict[str, Any]) -> Path:
        remote = {"model": model_url, "run_dir": f"{s3}/runs/{uuid.uuid4().hex[:8]}"}
        return write_run_file(tmp_path_factory.mktemp("remote"), *local_model, {**SETTINGS, **remote, **settings})

    return make


def results_of(done: FinishedRun) -> dict[str, dict[str, str]]:
    """Digests of what a run has made, but for the model cards, which name the model as the run file does."""
    return {
        part: {name: digest for name, digest in files.items() if name != "README.md"} for part, files in done.results().items()
    }
