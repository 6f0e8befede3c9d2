"""A refit on a cluster: drivers and workers that are killed while a layer is being solved."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipeline.commands.run import run
from pipeline.config import load_config
from pipeline.driver.run_state import RunOptions
from stages.contracts.settings import RunConfig
from tests.cluster.faults import FaultyExecutor
from tests.cluster.test_driver import events_of
from tests.conftest import REPOSITORY
from tests.runs import FinishedRun, Recorder, digests, write_run_file

pytestmark = pytest.mark.slow
_LIMIT_S = 500
HANGS = ("recombine/layer-0000", "hang")  # solves
KILLS = {
    "recombine/layer-0001/gather-0000": "kill before seal",
    "recombine/layer-0001/advance-0001": "kill before seal",
    "recombine/layer-0002": "kill before seal",
}


def test_a_killed_driver_and_killed_workers_of_a_refit_lose_nothing(
    cluster: Cluster,
    struck: Callable[[RunConfig, dict[str, str], Path], FaultyExecutor],
    tiny_checkpoint: Callable[[str], Path],
    token_ids: Path,
    tmp_path: Path,
) -> None:
    """The driver in the first layer, workers in later ones. The finished bytes are those of a local run, whose other stages
    the cluster's runs use."""
    settings = {
        "clustering": {"method": "pairs", "num_experts": [4]}, "refit": {"mode": "sequential", "neurons": "choose"},
        "export.formats": ["tied"], "evaluation": None, "resources.num_gpus": 1,
    }  # fmt: skip
    path = write_run_file(tmp_path, tiny_checkpoint("mixtral"), token_ids, settings)
    alone = FinishedRun.of(path, ["resources.num_gpus=0"])
    folder = alone.run_dir / alone.part("recombine", alone.view.targets[0].part).dir
    due = digests(folder, "*.*")
    shutil.rmtree(folder)
    num_before = len(events_of(path))

    markers = tmp_path / "markers"
    markers.mkdir()
    options = ("--address", cluster.address, "--marker-dir", str(markers), "--fault", *HANGS)
    command = [sys.executable, "-m", "tests.cluster.struck_driver", str(path), *options]
    driver = subprocess.Popen(command, cwd=REPOSITORY)
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline and driver.poll() is None and not list(markers.iterdir()):
        time.sleep(0.1)
    assert driver.poll() is None
    driver.kill()
    driver.wait(_LIMIT_S)

    config, recorder = load_config(path, []), Recorder()
    run(config, lambda: struck(config, KILLS, markers), recorder, RunOptions(only_stage="recombine"))
    events = events_of(path)[num_before:]
    sealed = [event["unit"] for event in events if event["event"] == "sealed"]
    assert len(list(markers.iterdir())) == 1 + len(KILLS), "every fault struck"
    assert sum(event["event"] == "lost" for event in events) >= len(KILLS)
    assert len(sealed) == len(set(sealed)), "no sealed unit ran twice"
    assert len(sealed) - len(recorder.units) > 0, "some were sealed before the driver was killed"
    assert digests(folder, "*.*") == due
    assert not list(alone.run_dir.rglob(".tmp-*"))
