"""Tasks of lm-evaluation-harness in a run: the scores are those of the harness's own command, whoever answers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.display.task_table import TaskTable
from pipeline.errors import RunFailed
from stages.contracts.errors import InputError
from tests.conftest import REPOSITORY
from tests.harness_tasks import LOCAL, write_tasks
from tests.runs import FinishedRun, execute, write_run_file
from tests.tiny import load

pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")

EXAMPLE = REPOSITORY / "examples" / "tiny-mixtral"
TEXTS = REPOSITORY / "examples" / "text"
MAX_LENGTH = 40
"""Shorter than some pages and questions with an example, so that windows roll and contexts are cut."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in float32."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(EXAMPLE, folder)
    load(EXAMPLE, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def run_file(folder: Path, model: Path, tasks: Path, names: list[str], **settings: Any) -> Path:
    common = {"num_sequences": 4, "sequence_length": 64}
    harness = {
        "include_path": str(tasks), "num_fewshot": 1, "max_length": MAX_LENGTH, "tokens_per_shard": 200,
        "tokens_per_micro_batch": 90,
    }  # fmt: skip
    values = {
        "calibration": {"data": str(TEXTS / "calibration-fiction.jsonl"), **common},
        "evaluation": {"data": str(TEXTS / "heldout-fiction.jsonl"), "tasks": names, "harness": harness, **common},
        "clustering.num_experts": [3], "resources.layers_per_shard": 2, **settings,
    }  # fmt: skip
    return write_run_file(folder, model, Path("unused"), values)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path, tasks: Path) -> FinishedRun:
    return FinishedRun.of(run_file(tmp_path_factory.mktemp("run"), model, tasks, [*LOCAL, "tiny_group"]))


def numbers(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Every number of the harness's results, by task and metric."""
    for task, row in rows.items():
        for key, value in row.items():
            if "," in key and isinstance(value, int | float):
                yield f"{task} {key}", value


def harness_results(done: FinishedRun, model: str) -> Any:
    """The harness's results of a model, also where a later run has published others."""
    return json.loads((done.run_dir / done.part("report").dir / "harness" / f"{model}.json").read_text())


def by_the_command(folder: Path, checkpoint: Path, tasks: Path, names: list[str], trusted: bool) -> dict[str, float]:
    """Scores of the harness's own command on a checkpoint."""
    trust = ",trust_remote_code=True" if trusted else ""
    options = {
        "model": "hf", "model_args": f"pretrained={checkpoint},dtype=float32,max_length={MAX_LENGTH}{trust}",
        "include_path": tasks, "num_fewshot": 1, "device": "cpu", "output_path": folder,
    }  # fmt: skip
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "lm_eval", "run", *given, "--tasks", *names]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (path,) = folder.rglob("results_*.json")
    return dict(numbers(json.loads(path.read_text())["results"]))


@pytest.mark.parametrize("export_format", ["stock", "tied"])
def test_streamed_and_whole_models_have_the_scores_of_the_harness_s_own_command(
    export_format: str, done: FinishedRun, model: Path, tasks: Path, tmp_path: Path
) -> None:
    """Few words, and the generated text, by brier score, perplexity, bits per byte and chrF, which show any difference."""
    name = f"tiny-3e-{export_format}"
    ours = dict(numbers(harness_results(done, name)["results"]))
    names = ["tiny_group", "tiny_rolling", "tiny_answer"]  # the group has the two others in it
    due = by_the_command(tmp_path / "command", done.model(f"3e-{export_format}"), tasks, names, export_format == "tied")
    assert ours.keys() == due.keys() and len(due) > 15
    assert ours == pytest.approx(due, rel=1e-6, abs=1e-6)
    assert due["tiny_choice brier_score,none"] > 0.1 and due["tiny_answer chrf,none"] > 0.1
    settings = {"evaluation.harness.backend": "hf", "evaluation.harness.batch_size": 3, "export.formats": [export_format]}
    whole = FinishedRun.of(done.run_file, [f"{key}={value}" for key, value in settings.items()])
    assert {unit.label.split(", ")[-1] for unit in whole.recorder.units if unit.stage == "evaluate"} == {*LOCAL, "tiny_group"}
    theirs = dict(numbers(harness_results(whole, name)["results"]))
    # several at once: the harness pads prompts from the left, which moves roundings of generated text's scores
    assert theirs == pytest.approx(due, rel=1e-6, abs=1e-6)


def test_requests_are_made_once_and_each_layer_is_loaded_once_for_all_tasks(done: FinishedRun) -> None:
    units = done.recorder.units
    assert sum(unit.stage == "requests" for unit in units) == len(LOCAL) + 1
    streamed = [
        unit
        for unit in units
        if unit.stage == "evaluate" and "task-" in unit.part_dir and unit.hold and "whole" not in unit.hold.key
    ]
    shards = {(unit.label.split(", ")[0], unit.hold.key) for unit in streamed if unit.hold}
    assert len(shards) == 3 * 2, "three models of two layer shards each"
    order = [unit.hold.key for unit in streamed if unit.hold]
    assert len([1 for before, key in zip(["", *order], order, strict=False) if before != key]) == len(shards), (
        "none is opened twice"
    )
    again = FinishedRun.of(done.run_file)
    assert again.recorder.units == []
    more = FinishedRun.of(done.run_file, ["evaluation.tasks=[tiny_word, tiny_choice]"])
    assert {unit.stage for unit in more.recorder.units} == {"report"}, "what is scored is kept"


def test_the_report_has_every_metric_with_its_error_and_versions(done: FinishedRun) -> None:
    source = done.report["models"][0]
    assert done.report["failed_tasks"] == []
    choice = source["tasks"]["tiny_choice"]
    raw = harness_results(done, source["name"])
    assert raw["model_name"] == source["name"] and set(raw["results"]) == {*LOCAL, "tiny_group"}
    assert choice["metric"] == {
        "metric": "acc", "filter": "none", "value": raw["results"]["tiny_choice"]["acc,none"],
        "standard_error": raw["results"]["tiny_choice"]["acc_stderr,none"], "higher_is_better": True,
    }  # fmt: skip
    assert [one["metric"] for one in choice["metrics"]] == ["acc", "acc_norm", "brier_score"]
    assert (choice["versions"], choice["num_documents"]) == ({"tiny_choice": 1.0}, 12)
    group = source["tasks"]["tiny_group"]
    assert group["metric"]["value"] == raw["results"]["tiny_group"]["acc,none"]
    assert set(group["tasks"]) == {"tiny_choice", "tiny_word"}
    rolling = source["tasks"]["tiny_rolling"]["metric"]
    assert (rolling["metric"], rolling["standard_error"], rolling["higher_is_better"]) == ("word_perplexity", None, False)
    libraries = done.report["versions"]["requests-tiny_choice"]
    assert libraries["lm_eval"] and libraries["datasets"]


def test_tables_have_tasks_across_with_average_and_share_of_the_source(done: FinishedRun) -> None:
    FinishedRun.of(done.run_file)  # publishes its report again
    published = json.loads((done.run_dir / "harness" / "tiny.json").read_text())
    assert published == harness_results(done, "tiny")
    out = CliRunner().invoke(app, ["compare", str(done.run_file), "--format", "json"]).stdout
    rows = json.loads(out)["tasks"]
    assert [row["model"] for row in rows] == [model["name"] for model in done.report["models"]]
    for row in rows:
        shares = [row["scores"][name]["value"] for name in ("tiny_choice", "tiny_word", "tiny_answer", "tiny_group")]
        assert row["average"] == pytest.approx(sum(shares) / 4), "perplexities do not count"
        assert row["retained"] == pytest.approx(row["average"] / rows[0]["average"])
    text = CliRunner().invoke(app, ["compare", str(done.run_file), "--format", "markdown"]).stdout
    assert "| model | tiny_choice (acc) | tiny_word (acc) | tiny_rolling (word_perplexity) |" in text
    table = TaskTable.of(done.report)
    assert table is not None and f"{rows[1]['average']:.4f}" in table.cells(rows[1]["model"])


def test_a_task_that_raises_fails_alone_and_is_tried_again(tmp_path: Path, model: Path, tasks: Path) -> None:
    """Also one whose requests cannot be made. All other scores stand; the exit code is not 0; the next run tries it alone."""
    own = tmp_path / "tasks"
    shutil.copytree(tasks, own)
    names = ["tiny_choice", "tiny_broken", "tiny_mute"]
    path = run_file(tmp_path, model, own, names, **{"export.formats": ["stock"]})
    found = CliRunner().invoke(app, ["run", str(path), "--executor", "local"])
    assert isinstance(found.exception, RunFailed), "which `main` turns into exit code 1"
    lines = str(found.exception).splitlines()
    assert lines == [
        "requests tiny_mute requests: KeyError: 'no question'",
        "evaluate tiny, tiny_broken, scores: ValueError: this task is broken",
        "evaluate tiny-3e-stock, tiny_broken, scores: ValueError: this task is broken",
        "report report.json: it lacks 4 of 6 scores of tasks",
        "all else is finished; the same command tries these again",
    ]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [set(one["tasks"]) for one in report["models"]] == [{"tiny_choice"}] * 2
    assert {(one["model"], one["task"]) for one in report["failed_tasks"]} == {
        (name, task) for name in ("tiny", "tiny-3e-stock") for task in ("tiny_broken", "tiny_mute")
    }
    table = TaskTable.of(report)
    assert table is not None and table.average("tiny") is None, "an average over fewer tasks would pass for one over all"
    from pipeline.config import load_config

    result, recorder = execute(load_config(path, []))
    assert len(result.shortfalls) == 4
    assert {f"{unit.stage} {unit.label}" for unit in recorder.units} == {line.split(": ")[0] for line in lines[:4]}


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (
            ["tiny_choice", "tiny_chioce"],
            {},
            r"evaluation\.tasks: tiny_chioce is no task of lm-evaluation-harness and none of ",
        ),
        (["tiny_gone"], {}, r"evaluation\.tasks: these cannot be loaded: tiny_gone \(.*HF_DATASETS_CACHE.*HF_HUB_OFFLINE=1"),
        (["tiny_unsafe"], {}, r"tiny_unsafe runs code that the model writes; set evaluation\.harness\.confirm_run_unsafe_code"),
        (["tiny_answer"], {"backend": "streamed"}, r"backend is streamed, but tiny_answer generates text, .* use hf or auto"),
        (["tiny_choice"], {"backend": "vllm"}, r"backend is vllm, which is not installed; use streamed, hf or auto"),
        (["../x"], {}, r"'\.\./x' is no name of a task"),
        (["tiny_answer"], {"worker_memory": "12 MB"}, r"evaluation\.tasks \(tiny_answer\) needs a whole model in one worker"),
        (["tiny_choice"], {"include_path": "/nowhere"}, r"evaluation\.harness\.include_path: /nowhere is not a folder"),
    ],
)
def test_what_cannot_be_scored_is_one_line_before_anything_runs(
    tmp_path: Path, model: Path, tasks: Path, names: list[str], settings: dict[str, Any], message: str
) -> None:
    place = {"worker_memory": "resources"}
    given = {f"{place.get(name, 'evaluation.harness')}.{name}": value for name, value in settings.items()}
    path = run_file(tmp_path, model, tasks, names, **given)
    found = CliRunner().invoke(app, ["plan", str(path)])
    assert isinstance(found.exception, InputError)
    assert "\n" not in str(found.exception)
    with pytest.raises(InputError, match=message):
        raise found.exception


def test_code_of_a_model_runs_only_with_the_harness_s_own_permission(tmp_path: Path, model: Path, tasks: Path) -> None:
    settings = {"evaluation.harness.confirm_run_unsafe_code": True, "export.formats": ["stock"]}
    done = FinishedRun.of(run_file(tmp_path, model, tasks, ["tiny_unsafe"], **settings))
    assert "tiny_unsafe" in done.report["models"][0]["tasks"]


def test_plan_says_what_each_task_needs_and_who_answers(tmp_path: Path, model: Path, tasks: Path) -> None:
    path = run_file(tmp_path, model, tasks, ["tiny_group", "tiny_answer"])
    out = CliRunner().invoke(app, ["plan", str(path)]).stdout
    assert "task         tiny_group: 24 documents of json; loglikelihood, multiple_choice; 2 tasks" in out
    assert "backend      tiny_group: streamed, since it needs log-likelihoods alone" in out
    assert "backend      tiny_answer: hf, since it generates text" in out
    assert "3 x 2 tasks" in out
