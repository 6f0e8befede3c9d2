"""A process that is connected to a cluster: the Python API runs on it and leaves it, and `init` fits a run file to it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

import hcsmoe
from pipeline.config import load_config
from tests.conftest import REPOSITORY
from tests.runs import Call


def test_compress_runs_on_it_and_stays_connected(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path, cluster: None
) -> None:
    settings = {
        "calibration.num_sequences": 8, "calibration.sequence_length": 32, "resources.num_gpus": 0, "resources.num_workers": 1,
    }  # fmt: skip
    result = hcsmoe.compress(
        tiny_checkpoint("mixtral"), target=3, method="reap", data=token_ids, run_dir=tmp_path / "run", settings=settings,
        address="auto", progress=False,
    )  # fmt: skip
    assert ray.is_initialized() and result.models[0].num_experts == 3
    assert (result.models[0].path / "config.json").exists()
    with pytest.raises(hcsmoe.InputError, match="this process is connected to a Ray cluster; use auto, or call"):
        hcsmoe.compress(
            tiny_checkpoint("mixtral"), target=2, method="reap", data=token_ids, run_dir=tmp_path / "run", settings=settings,
            address="local", progress=False,
        )  # fmt: skip
    assert ray.is_initialized()


def test_init_in_the_connected_process_fits_a_run_file_to_it_and_stays_connected(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], cluster: None, call: Call
) -> None:
    code, printed, _ = call("init", tiny_checkpoint("mixtral"), "--output", tmp_path / "run.yaml")
    assert code == 0 and "fitted to the running Ray cluster: 2 CPUs" in printed and "2 x GPU" in printed
    assert ray.is_initialized()


def test_init_fits_a_run_file_to_it(tmp_path: Path, tiny_checkpoint: Callable[[str], Path], cluster: None) -> None:
    """It pretends to have two GPUs, whose memory nobody knows."""
    env = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    run_file = tmp_path / "run.yaml"
    command = [sys.executable, "-m", "pipeline", "init", str(tiny_checkpoint("mixtral")), "--output", str(run_file)]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "fitted to the running Ray cluster: 2 CPUs" in done.stdout and "2 x GPU" in done.stdout
    resources = load_config(run_file, []).resources
    assert (resources.num_gpus, resources.num_cpus, resources.worker_memory // 10**6) == (1, 1, 8589)
