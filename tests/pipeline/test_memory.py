"""What a worker is estimated to need, against what it takes: `VmHWM` of new processes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.contracts.partition import held_bytes
from stages.contracts.text_settings import Calibration, Evaluation
from stages.model.survey import survey_checkpoint
from tests.conftest import REPOSITORY
from tests.quantised import checkpoint
from tests.runs import read_config
from tests.tiny import build, save

SIZES = {
    "hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_hidden_layers": 4, "vocab_size": 8192,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
SETTINGS = {"num_sequences": 8, "sequence_length": 256, "tokens_per_shard": 2048, "tokens_per_micro_batch": 2048}
DATA = {
    "calibrate": Calibration.model_validate({"data": "ids.npy", **SETTINGS}),
    "evaluate": Evaluation.model_validate({"data": "ids.npy", **SETTINGS}),
}

_GROWTH = """
import json, sys
from pathlib import Path
from pipeline.driver.worker import Worker
from stages.calibrate.spec import CALIBRATE, OPEN, REDUCE, CalibrateArgs, CalibrationShardArgs, ReduceArgs
from stages.contracts.texts import DomainShards
from stages.contracts.stream_units import LayerShardArgs, StreamArgs
from stages.contracts.units import Hold, Unit
from stages.evaluate import spec as evaluate
from stages.prepare.spec import TOKENS, TextArgs, TokensArgs
import stages.calibrate.units, stages.evaluate.units
from stages.model.survey import survey_checkpoint
folder, stage, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
survey, _ = survey_checkpoint(model)
def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
def unit(name, call, hold=None):
    return Unit(str(folder), stage, stage, name, call, name, hold=hold, on_worker=True)
worker = Worker()
def run(one):
    outcome = worker.run(one)
    assert outcome.failure is None, outcome.failure
text = TextArgs("calibration", model, False, (str(folder / "ids.npy"),), "text", 8, 256, 0)
run(unit("tokens", TOKENS.on(TokensArgs(text, 8))))
before = peak()
stream = StreamArgs(stage, 0, 8, is_last=stage == "evaluate")
if stage == "calibrate":
    opened = OPEN.on(CalibrationShardArgs(model, 0, 4, 1, survey.routers))
    shard = CALIBRATE.on(CalibrateArgs(stream, None, ()))
else:
    opened = evaluate.OPEN.on(LayerShardArgs(model, 0, 4, 1))
    shard = evaluate.EVALUATE.on(evaluate.EvaluateArgs(stream, 0, None))
hold = Hold("all", opened, str(folder), "layers")
run(unit("shard", shard, hold))
if stage == "calibrate":
    run(unit("reduce", REDUCE.on(ReduceArgs(1, (DomainShards("", 0, 1),), False, ())), hold))
print(json.dumps(peak() - before))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build("mixtral", torch.float32, **SIZES), tmp_path_factory.mktemp("mid") / "model")


def test_experts_that_are_packed_count_as_they_are_packed(tmp_path: Path) -> None:
    sizes = {name: size for name, size in SIZES.items() if name != "num_local_experts"}
    sizes |= {"moe_intermediate_size": 1024, "num_experts": 24}
    packed, _ = checkpoint("fp8-channel", tmp_path, **sizes, mlp_only_layers=[])
    # Computed in float32: a processor without instructions for bfloat16 takes minutes for it.
    (packed / "config.json").write_text(json.dumps({**read_config(packed), "dtype": "float32"}))
    survey, _ = survey_checkpoint(str(packed))
    grown, estimate = _growth(packed, tmp_path, "calibrate")
    assert grown <= estimate <= 2 * grown
    assert grown < sum(survey.layer_bytes), "less than the values of all layers"


@pytest.mark.parametrize("stage", ["calibrate", "evaluate"])
def test_the_estimate_covers_what_a_worker_takes_and_is_not_twice_as_much(model: Path, tmp_path: Path, stage: str) -> None:
    grown, estimate = _growth(model, tmp_path, stage)
    assert grown <= estimate <= 2 * grown


def _growth(model: Path, tmp_path: Path, stage: str) -> tuple[int, int]:
    """Bytes that a worker takes for a stage, and the estimate."""
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 8192, (8, 256)))
    survey, _ = survey_checkpoint(str(model))
    command = [sys.executable, "-c", _GROWTH, str(tmp_path), stage, str(model)]
    done = subprocess.run(command, timeout=500, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    return grown, held_bytes(survey, (0, 4), DATA[stage])
