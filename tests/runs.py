"""Runs of the pipeline in this process, and what they left."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from pipeline.checks import check
from pipeline.commands.run import run
from pipeline.config import apply_setting, load_config
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
        view = RunView(config, checked.inputs)
        return cls(run_file, config, view, view.run_dir, view.model, report, recorder or Recorder())

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
