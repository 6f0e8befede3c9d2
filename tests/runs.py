"""Runs of the pipeline in this process, and what they left."""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.checks import check
from pipeline.commands.run import run
from pipeline.config import apply_setting, load_config
from pipeline.config import read_config as read_run_file
from pipeline.display.progress import Reporter
from pipeline.driver.outcome import Outcome
from pipeline.driver.run_state import RunOptions, RunResult
from pipeline.executors.base import Executor
from pipeline.executors.local import LocalExecutor
from pipeline.run.view import RunView
from stages.contracts.keys import Part
from stages.contracts.paths import CHECKPOINT_DIR
from stages.contracts.settings import RunConfig
from stages.contracts.units import Unit
from stages.io.files import sha256_of
from stages.model.layer_shard import LayerShard

Call = Callable[..., tuple[int, str, str]]
"""Runs a command; returns its exit code, its output and its errors. See the fixture `call`."""


class Recorder(Reporter):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.units: list[Unit] = []

    def done(self, unit: Unit, outcome: Outcome) -> None:
        self.units.append(unit)

    @property
    def stages(self) -> set[str]:
        """Stages of which at least one unit ran."""
        return {unit.stage for unit in self.units}


def write_run_file(folder: Path, model: Path, data: Path, settings: Mapping[str, Any]) -> Path:
    """A run file over token ids [8, 32]: two token shards of two micro-batches. settings: dotted names on top."""
    text = {
        "data": str(data),
        "num_sequences": 8,
        "sequence_length": 32,
        "tokens_per_shard": 128,
        "tokens_per_micro_batch": 64,
    }
    values: dict[str, Any] = {
        "model": str(model),
        "run_dir": str(folder / "run"),
        "calibration": text,
        "clustering": {"num_experts": [3]},
        "export": {"max_file_bytes": "100 kB"},
        "evaluation": dict(text),
    }
    for name, value in settings.items():
        apply_setting(values, f"{name}={yaml.safe_dump(value, default_flow_style=True)}")
    path = folder / "run.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def execute(
    config: RunConfig, make_executor: Callable[[], Executor] = LocalExecutor, verify: bool = False
) -> tuple[RunResult, Recorder]:
    """Run the pipeline; returns its result and which units ran."""
    recorder = Recorder()
    return run(config, make_executor, recorder, RunOptions(verify)), recorder


def digests(folder: Path, pattern: str = "**/*") -> dict[str, str]:
    """SHA-256 of every file under a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its config, what its stages see, and folders."""

    run_file: Path
    config: RunConfig
    view: RunView
    run_dir: Path
    source: Path
    report: Mapping[str, Any]
    recorder: Recorder

    @classmethod
    def of(
        cls, run_file: Path, settings: list[str] | None = None, make_executor: Callable[[], Executor] = LocalExecutor
    ) -> "FinishedRun":
        config = load_config(run_file, settings or [])
        result, recorder = execute(config, make_executor)
        return cls.found(run_file, config, result.report, recorder)

    @classmethod
    def found(
        cls, run_file: Path, config: RunConfig, report: Mapping[str, Any], recorder: Recorder | None = None
    ) -> "FinishedRun":
        """A run that another process has finished."""
        checked = check(config)
        view = RunView(checked.config, checked.inputs)
        return cls(run_file, checked.config, view, view.run_dir, view.model, report, recorder or Recorder())

    def copied(self, folder: Path) -> "FinishedRun":
        """A copy of the run and of what lies beside it, which a test may change."""
        shutil.copytree(self.run_dir.parent, folder, symlinks=True, dirs_exist_ok=True)
        for path in (folder / "run.yaml", folder / "run" / "run.json"):
            path.write_text(path.read_text().replace(str(self.run_dir), str(folder / "run")))
        return self.found(folder / "run.yaml", load_config(folder / "run.yaml", []), self.report)

    def part(self, stage: str, name: str = "") -> Part:
        return self.view.part(stage, name)

    @property
    def calibrate_dir(self) -> Path:
        return self.run_dir / self.part("calibrate").dir

    @property
    def cluster_dir(self) -> Path:
        return self.run_dir / self.part("cluster").dir

    def model(self, target: str) -> Path:
        """Folder of a finished checkpoint, such as `3e-tied`: the one of this run, where a later one has taken the name."""
        (found,) = [one for one in self.view.targets if one.name == f"{self.config.name}-{target}"]
        return self.run_dir / self.part("assemble", found.part).dir / CHECKPOINT_DIR

    def results(self) -> dict[str, dict[str, str]]:
        """Digests of statistics, dendrograms and labels, and of every finished checkpoint."""
        found = {
            "statistics": digests(self.calibrate_dir, "*.arrow"),
            "clusters": digests(self.cluster_dir, "*.arrow"),
        }
        for target in self.view.targets:
            found[target.name] = digests(self.model(target.part))
        assert all(found.values())
        return found


NUM_SEQUENCES, NUM_TOKENS = 4, 16


def token_ids(folder: Path) -> tuple[Path, Tensor]:
    """Token ids [4, 16] of the tiny vocabulary, as a file and as a tensor."""
    ids = np.random.default_rng(1).integers(3, 128, (NUM_SEQUENCES, NUM_TOKENS))
    path = folder / "ids.npy"
    np.save(path, ids)
    return path, torch.from_numpy(ids)


def run_config(
    source: Path | str, run_dir: Path, ids: Path, targets: list[Any], formats: list[str], **changes: Any
) -> RunConfig:
    """A run over token ids, without evaluation. changes: top-level settings."""
    settings = {
        "model": str(source),
        "run_dir": str(run_dir),
        "calibration": {
            "data": str(ids), "num_sequences": NUM_SEQUENCES, "sequence_length": NUM_TOKENS,
            "tokens_per_micro_batch": NUM_SEQUENCES * NUM_TOKENS,
        },
        "clustering": {"num_experts": targets},
        "resources": {"layers_per_shard": 2},
        **changes,
    }  # fmt: skip
    settings["export"] = {"formats": formats, "max_file_bytes": "200 kB", **changes.get("export", {})}
    return read_run_file(settings)


def run_all(
    source: Path | str, run_dir: Path, ids: Path, targets: list[Any], formats: list[str], **changes: Any
) -> dict[str, Path]:
    """Run the pipeline; return the folders of its exports by the end of their name, such as `4e-tied`."""
    config = run_config(source, run_dir, ids, targets, formats, **changes)
    run(config, LocalExecutor, Reporter(Console(quiet=True)), RunOptions())
    return {path.name.removeprefix(f"{config.name}-"): path for path in (run_dir / "models").iterdir()}


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its tensors in memory of their own.

    transformers leaves weights where a file's header happens to put them in its mapped pages; some float32 kernels take another
    path there than in memory that torch allocated, and differ in the last bit. Ours are always the latter.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def streamed_logits(checkpoint: Any, num_layers: int, ids: Tensor, step: int = 2) -> Tensor:
    """Logits [B, T, V] by layer shards of `step` layers."""
    hidden = None
    for first in range(0, num_layers, step):
        shard = LayerShard(checkpoint, first, min(first + step, num_layers), num_threads=1)
        hidden = shard.embed(ids) if hidden is None else hidden
        for layer in range(shard.first, shard.stop):
            hidden = shard.run_layer(layer, hidden)
    assert hidden is not None
    return shard.logits(hidden)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name)
    return found


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    """The same as bytes, which also compare where a tensor holds NaN."""
    tensors = read_tensors(folder)
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def rewrite(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """Make a folder's weights one file with these tensors; config: replaces `config.json`."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The raw `config.json`."""
    return dict(json.loads((folder / "config.json").read_text()))
