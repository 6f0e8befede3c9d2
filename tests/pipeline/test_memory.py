"""What a worker is estimated to need, against what it takes: `VmHWM` of new processes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Calibration, Evaluation
from pipeline.run.partition import held_bytes
from stages.prepare.stage import survey_tables
from tests.conftest import REPOSITORY
from tests.stages.tiny import build, save

SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_hidden_layers": 4, "vocab_size": 8192,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
SETTINGS = {"num_sequences": 32, "sequence_length": 256, "tokens_per_shard": 8192, "tokens_per_micro_batch": 4096}
DATA = {
    "calibrate": Calibration.model_validate({"data": "ids.npy", **SETTINGS}),
    "evaluate": Evaluation.model_validate({"data": "ids.npy", **SETTINGS}),
}

_GROWTH = """
import json, sys
from pathlib import Path
from pipeline.driver.units import Hold, Unit
from pipeline.driver.worker import Worker
import stages.calibrate.stage, stages.evaluate.stage
from stages.prepare.stage import survey_tables
folder, stage, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
plan, _ = survey_tables(model)
def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
def unit(name, call, args, hold=None):
    return Unit(str(folder), stage, stage, name, call, args, name, hold=hold, on_worker=True)
worker = Worker()
def run(one):
    outcome = worker.run(one)
    assert outcome.failure is None, outcome.failure
tokens = {"place": "calibration", "model": model, "data": [str(folder / "ids.npy")], "text_field": "text", "revision": None,
          "num_sequences": 32, "sequence_length": 256, "seed": 0, "trust_remote_code": False, "sequences_per_shard": 32}
run(unit("tokens", "stages.prepare.stage:tokens_unit", tokens))
before = peak()
call = {"calibrate": "stages.calibrate.stage:open_shard", "evaluate": "stages.model.layer_shard:open_layer_shard"}[stage]
routers = {"routers": plan["routers"]} if stage == "calibrate" else {}
hold = Hold("all", call, {"model": model, "first": 0, "stop": 4, "num_threads": 1, **routers})
args = {"tokens_dir": stage, "shard": 0, "micro_batch": 16, "is_last": stage == "evaluate", "sampling": None}
run(unit("shard", f"stages.{stage}.stage:{stage}_unit", args, hold))
if stage == "calibrate":
    reduce = {"layer": 1, "num_shards": 1, "is_sampled": False}
    run(unit("reduce", "stages.calibrate.stage:reduce_unit", reduce, hold))
print(json.dumps(peak() - before))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("mixtral", torch.float32, **SIZES), tmp_path_factory.mktemp("mid") / "model")


@pytest.mark.parametrize("stage", ["calibrate", "evaluate"])
def test_the_estimate_covers_what_a_worker_takes_and_is_not_twice_as_much(model: Path, tmp_path: Path, stage: str) -> None:
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 8192, (32, 256)))
    plan, _ = survey_tables(str(model))
    command = [sys.executable, "-c", _GROWTH, str(tmp_path), stage, str(model)]
    done = subprocess.run(command, timeout=500, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    estimate = held_bytes(plan, (0, 4), DATA[stage])
    assert grown <= estimate <= 2 * grown
