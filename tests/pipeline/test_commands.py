"""Reruns of single stages, batches, and cleaning, by the command line as a user calls it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pipeline.commands.batch import _summary
from pipeline.config import load_config
from stages.registry import STAGES
from tests.runs import Call, FinishedRun, digests, write_run_file

Outputs = Callable[..., tuple[int, str]]
Checkpoints = Callable[[str], Path]
BUSY = tuple(stage for stage in STAGES if stage not in ("requests", "mtp"))
"""Stages that have something to do where there are no tasks."""


@pytest.fixture
def call(call: Call) -> Outputs:
    """Exit code and all output of a command."""

    def run(*arguments: str) -> tuple[int, str]:
        code, *printed = call(*arguments)
        return code, "".join(printed)

    return run


@pytest.fixture
def run_file(tmp_path: Path, tiny_checkpoint: Checkpoints, token_ids: Path) -> Path:
    """A run in which every stage of BUSY has something to do."""
    return write_run_file(tmp_path, tiny_checkpoint("mixtral"), token_ids, {"refit.mode": "sequential"})


def seals(run_dir: Path) -> dict[str, int]:
    """When each manifest was written, in nanoseconds, by its stage's directory and name."""
    return {path.relative_to(run_dir).as_posix(): path.stat().st_mtime_ns for path in run_dir.glob("*/manifests/**/*.json")}


def test_only_runs_one_stage_and_all_of_them_in_turn_make_the_whole(run_file: Path, call: Outputs) -> None:
    run_dir = run_file.parent / "run"
    code, output = call("run", str(run_file), "--executor", "local", "--only", "merge")
    assert code == 2 and "--only merge needs prepare, of which 3 of 3 units are not done" in output
    for stage in BUSY:
        code, output = call("run", str(run_file), "--executor", "local", "--only", stage)
        assert code == 0, output
        assert {name.split("-")[0] for name in seals(run_dir)} == set(BUSY[: BUSY.index(stage) + 1])
        assert ("checkpoints  " in output) == (stage == "report")
    assert "\n0 units run" in call("run", str(run_file), "--executor", "local")[1]


def test_only_checks_the_targets_against_the_layers_too(run_file: Path, call: Outputs) -> None:
    assert call("run", str(run_file), "--executor", "local", "--only", "cluster")[0] == 2
    assert call("run", str(run_file), "--executor", "local")[0] == 0
    settings = ("--set", "clustering.num_experts=[[3, 2]]", "--set", "export.formats=[tied]")
    code, output = call("run", str(run_file), "--executor", "local", "--only", "merge", *settings)
    assert code == 2 and "2 numbers" in output and "3 MoE layers" in output


@pytest.mark.parametrize("stage", BUSY)
def test_from_redoes_a_stage_and_what_follows_to_the_same_bytes(run_file: Path, call: Outputs, stage: str) -> None:
    done = FinishedRun.of(run_file)
    before, results = seals(done.run_dir), done.results()
    code, output = call("run", str(run_file), "--executor", "local", "--from", stage)
    assert code == 0, output
    after = seals(done.run_dir)
    redone = {name.split("-")[0] for name in after if after[name] != before[name]}
    assert redone == set(BUSY[BUSY.index(stage) :])
    assert all(after[name] != before[name] for name in after if name.split("-")[0] in redone)
    assert done.results() == results


def test_clean_lists_and_then_removes_what_the_last_run_does_not_use(run_file: Path, call: Outputs) -> None:
    old = FinishedRun.of(run_file)
    new = FinishedRun.of(run_file, ["clustering.linkage=single", "clustering.num_experts=[2]"])
    kept = new.results()
    code, output = call("clean", str(old.run_dir))
    assert code == 0 and "--yes removes them" in output
    assert (old.run_dir / old.part("cluster").dir).exists()
    code, output = call("clean", str(old.run_dir), "--yes")
    assert code == 0, output
    assert not (old.run_dir / old.part("cluster").dir).exists()
    assert {path.name for path in old.run_dir.glob("*-*") if path.is_dir()} == {stage.dir for stage in new.view.all_parts()}
    assert {link.name for link in (old.run_dir / "models").iterdir()} == {target.name for target in new.view.targets}
    assert new.results() == kept
    assert "\n0 directories" in "\n" + call("clean", str(old.run_dir))[1]


def test_clean_of_a_folder_without_a_run_is_one_error(tmp_path: Path, call: Outputs) -> None:
    code, output = call("clean", str(tmp_path), "--yes")
    assert code == 2 and "is not a run directory" in output


def test_a_batch_goes_on_past_a_run_that_is_refused_and_resumes(
    tmp_path: Path, tiny_checkpoint: Checkpoints, token_ids: Path, call: Outputs
) -> None:
    """Two families, and a run with more experts than there are: the two have the bytes that they have alone."""
    files = [write_run_file(tmp_path / name, tiny_checkpoint(name), token_ids, {}) for name in ("mixtral", "qwen3_moe")]
    runs = [*({"run": str(path)} for path in files), {"run": str(files[0]), "set": {"clustering.num_experts": [99]}}]
    batch_file = tmp_path / "batch.yaml"
    batch_file.write_text(yaml.safe_dump({"batch_dir": str(tmp_path / "batch"), "runs": runs}))
    code, output = call("batch", str(batch_file), "--executor", "local")
    assert code == 1 and "clustering.num_experts is 99" in output
    records = json.loads((tmp_path / "batch" / "batch.json").read_text())["runs"]
    assert [record["error"] is None for record in records] == [True, True, False]
    for path in files:
        found = FinishedRun.found(path, load_config(path, []), {})
        alone = FinishedRun.of(path, [f"run_dir={path.parent / 'alone'}"])
        assert {k: v for k, v in found.results().items() if k in ("statistics", "clusters")} == {
            k: v for k, v in alone.results().items() if k in ("statistics", "clusters")
        }
        assert digests(found.model("3e-stock"), "*.safetensors") == digests(alone.model("3e-stock"), "*.safetensors")
    call("batch", str(batch_file), "--executor", "local")
    again = json.loads((tmp_path / "batch" / "batch.json").read_text())["runs"]
    assert [record.get("num_run") for record in again] == [0, 0, None]


def test_brackets_of_names_and_errors_stand_in_the_summary_of_a_batch() -> None:
    model = {"name": "tiny", "num_experts": [3, 2], "bytes": 1, "path": "/models/[red]tiny"}
    records = [
        {"run": "a[b].yaml", "error": "shape [8, 32] in [bold]x", "models": []},
        {"run": "c.yaml", "error": None, "models": [model]},
    ]
    console = Console(file=io.StringIO(), width=160)
    console.print(_summary(records))
    text = console.file.getvalue()
    for shown in ("a[b].yaml", "failed: shape [8, 32] in [bold]x", "[3, 2]", "/models/[red]tiny"):
        assert shown in text


def test_two_runs_of_a_batch_cannot_share_a_run_directory(tmp_path: Path, run_file: Path, call: Outputs) -> None:
    batch_file = tmp_path / "batch.yaml"
    batch_file.write_text(yaml.safe_dump({"batch_dir": str(tmp_path / "batch"), "runs": [{"run": str(run_file)}] * 2}))
    code, output = call("batch", str(batch_file), "--executor", "local")
    assert code == 2 and "runs 1 and 2 have the same run_dir" in output
    assert not (tmp_path / "run").exists()
