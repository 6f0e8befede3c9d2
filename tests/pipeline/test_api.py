"""The Python API: the same runs and checks as run files, typed results, a notebook."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

import hcsmoe
from pipeline.display import notebook
from stages.contracts.events import SEALED, STAGE_BEGINS, STARTED, Event
from tests.conftest import REPOSITORY
from tests.runs import FinishedRun, digests
from tests.tiny import FAMILIES

Checkpoints = Callable[[str], Path]
SHORT = {"num_sequences": 8, "sequence_length": 32, "tokens_per_shard": 128}
SETTINGS = {f"{section}.{name}": value for section in ("calibration", "evaluation") for name, value in SHORT.items()}


@pytest.fixture(scope="module")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoints, token_ids: Path
) -> tuple[hcsmoe.Result, dict[str, object]]:
    """Two methods at half the experts, tied and stock; and the arguments."""
    asked: dict[str, object] = {
        "model": tiny_checkpoint("mixtral"), "target": 0.5, "method": ["hc-smoe", "reap"], "data": token_ids,
        "evaluation": [token_ids], "run_dir": tmp_path_factory.mktemp("api") / "run", "settings": SETTINGS,
    }  # fmt: skip
    return hcsmoe.compress(**asked, progress=False), asked  # type: ignore[arg-type]


def test_a_call_makes_what_the_run_file_of_the_same_settings_makes(
    compressed: tuple[hcsmoe.Result, dict[str, object]], tmp_path: Path, token_ids: Path
) -> None:
    result, asked = compressed
    text = {"data": str(token_ids), **SHORT}
    run_file = tmp_path / "run.yaml"
    values = {
        "model": str(asked["model"]), "run_dir": str(tmp_path / "run"), "calibration": text, "evaluation": text,
        "clustering": {"num_experts": [FAMILIES["mixtral"].num_experts // 2]}, "export": {"formats": ["stock"]},
        "variants": ["hc-smoe", "reap"],
    }  # fmt: skip
    run_file.write_text(json.dumps(values))
    FinishedRun.of(run_file)
    assert [one.name for one in result.models] == sorted(path.name for path in (tmp_path / "run" / "models").iterdir())
    for one in result.models:
        assert digests(one.path, "*.safetensors") == digests(tmp_path / "run" / "models" / one.name, "*.safetensors")
    theirs = hcsmoe.load_report(tmp_path / "run")
    assert [one.perplexity for one in theirs.models] == [one.perplexity for one in result.models]


def test_results_are_those_of_the_report_and_load(compressed: tuple[hcsmoe.Result, dict[str, object]]) -> None:
    result, _ = compressed
    values = json.loads((result.run_dir / "report.json").read_text())
    assert result.report.source.perplexity == values["models"][0]["perplexity"]
    assert result.report.source.format is None and result.report.source.path == Path(values["models"][0]["path"])
    for row, model in zip(values["models"][1:], result.models, strict=True):
        assert (model.name, model.variant, model.format) == (row["name"], row["variant"], "stock")
        assert (model.num_parameters, model.num_bytes, model.perplexity) == (row["parameters"], row["bytes"], row["perplexity"])
        assert model.path == result.run_dir / "models" / model.name
    name = result.models[1].name
    ours, theirs = result.load(name), AutoModelForCausalLM.from_pretrained(result.models[1].path, dtype="auto")
    assert not ours.training and ours.dtype == torch.float32
    ids = torch.arange(3, 19)[None]
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    with pytest.raises(hcsmoe.InputError, match="has made 2 models; give the name"):
        result.load()
    with pytest.raises(hcsmoe.InputError, match="no model named mixtral"):
        result.load("mixtral")


def test_the_same_call_reuses_and_another_format_recalibrates_nothing(
    compressed: tuple[hcsmoe.Result, dict[str, object]],
) -> None:
    result, asked = compressed
    again = hcsmoe.compress(**asked, progress=False)  # type: ignore[arg-type]
    assert (again.num_run, again.num_reused) == (0, result.num_run)
    tied = hcsmoe.compress(**{**asked, "method": "hc-smoe", "formats": "tied"}, progress=False)  # type: ignore[arg-type]

    assert len(list(tied.run_dir.glob("calibrate-*"))) == 1
    loaded = tied.load()
    assert "expert_map" in " ".join(loaded.state_dict())
    hidden = tied.models[0].path / "modeling_hcsmoe.py"
    copy = tied.run_dir.parent / "changed"
    shutil.copytree(hidden.parent, copy)
    (copy / hidden.name).write_text(hidden.read_text() + "\nraise SystemExit('run')\n")
    changed = hcsmoe.Model(**{**vars(tied.models[0]), "path": copy})
    with pytest.raises(hcsmoe.InputError, match="it is not run"):
        changed.load()


def test_plan_and_inspect_tell_what_a_run_writes(compressed: tuple[hcsmoe.Result, dict[str, object]]) -> None:
    result, asked = compressed
    plan = hcsmoe.plan(**asked)  # type: ignore[arg-type]
    assert [(one.name, one.num_bytes) for one in plan.checkpoints] == [(one.name, one.num_bytes) for one in result.models]
    assert plan.num_bytes == result.report.source.num_bytes and plan.stages
    found = hcsmoe.inspect(asked["model"])  # type: ignore[arg-type]
    sizes = {one.num_experts: one.stock for one in found.sizes}
    assert found.reason is None and sizes[found.num_experts // 2] == result.models[0].num_bytes  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "worst"}, "there is no preset named worst; known presets: .*recombine"),
        ({"target": 99}, "clustering.num_experts is 99 but .* use at most"),
        ({"target": 1.5}, r"arguments: clustering.num_experts.0.share: Input should be less than or equal to 1 \(it is 1.5\)"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"settings": {"calibration.num_sequence": 3}}, "calibration.num_sequence is not a setting"),
        ({"formats": "gguf"}, "export.formats.0: Input should be 'tied' or 'stock'"),
    ],
)
def test_bad_arguments_are_refused_as_in_a_run_file(
    changes: dict[str, object], message: str, compressed: tuple[hcsmoe.Result, dict[str, object]], tmp_path: Path
) -> None:
    asked = {**compressed[1], "run_dir": tmp_path / "run", **changes}
    for call in (hcsmoe.plan, hcsmoe.compress):
        with pytest.raises(hcsmoe.InputError, match=message):
            call(**asked)  # type: ignore[operator]
    assert not (tmp_path / "run").exists()


def test_the_module_is_the_command_line_too() -> None:
    command = [sys.executable, "-m", "hcsmoe", "run", "nowhere.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "run file nowhere.yaml cannot be read" in done.stderr


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(hcsmoe.InputError, match=r"report.json does not exist; a run writes it"):
        hcsmoe.load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"models": [{}]}')
    with pytest.raises(hcsmoe.InputError, match="is no report of this version"):
        hcsmoe.load_report(tmp_path / "report.json")


def test_the_quickstart_runs_in_a_notebook_with_bars(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    book = nbformat.read(REPOSITORY / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "committed without outputs"
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", ())]
    printed = [output.text for output in outputs if output.output_type == "stream"]
    assert not [text for text in printed if "IProgress" not in text]  # tqdm would like widgets, which nothing here needs
    bars = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(bars) == 1 and all(f"<td>{stage}</td>" in bars[0] for stage in ("calibrate", "merge", "evaluate", "report"))
    results = [output.data["text/plain"] for output in outputs if output.output_type == "execute_result"]
    assert results[0].startswith("('mixtral', 8,") and "tiny-mixtral-recombine-4e-stock" in results[2]
    assert "In the beginning" in results[3]


def test_bars_are_redrawn_at_most_four_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    class Output:
        def update(self, page: object) -> None:
            drawn.append(page.data)  # type: ignore[attr-defined]

    now = [100.0]
    monkeypatch.setattr(notebook.time, "monotonic", lambda: now[0])
    reporter = notebook.NotebookReporter()
    reporter._output = Output()
    reporter.note(Event(time=100, event=STAGE_BEGINS, stage="calibrate", num_units=400, num_reused=2))
    for number in range(400):
        now[0] += 1 / 400
        unit = f"calibrate-1/{number}"
        reporter.note(Event(time=100 + number / 400, event=STARTED, stage="calibrate", unit=unit))
        reporter.note(Event(time=100 + (number + 1) / 400, event=SEALED, stage="calibrate", unit=unit, elapsed_s=0.1))
    assert len(drawn) <= 6
    reporter.end("calibrate")
    assert "value='400' max='400'" in drawn[-1] and "400/400, 2 reused" in drawn[-1] and "1.0 s" in drawn[-1]
    now[0] += 1
    reporter.line("<script>")
    assert "<pre>&lt;script&gt;</pre>" in drawn[-1]
