"""Tasks of lm-evaluation-harness in a run: the scores are those of the harness's own command, whoever answers."""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import load_config
from pipeline.display.task_table import TaskTable
from pipeline.errors import RunFailed
from stages.contracts.errors import InputError
from stages.contracts.tasks import task_args
from stages.contracts.text_settings import Harness
from stages.harness import notes
from tests.conftest import REPOSITORY
from tests.harness_command import BOOTSTRAP_ITERS
from tests.harness_tasks import LOCAL, write_tasks
from tests.runs import FinishedRun, execute, write_run_file
from tests.tiny import load

lm_eval = pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")

EXAMPLE = REPOSITORY / "examples" / "tiny-mixtral"
TEXTS = REPOSITORY / "examples" / "text"
MAX_LENGTH = 40
"""Shorter than some pages and questions with an example, so that windows roll and contexts are cut."""
NAMES = ("tiny_choice", "tiny_rolling", "tiny_answer", "tiny_group")
"""One of each kind; the group has tiny_word in it."""
ask_process = notes._ask
ask_here = cache(notes.answer_to)


@pytest.fixture(autouse=True)
def _asked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks are looked at in this process, which has loaded the harness. One test asks another process, as runs do."""
    monkeypatch.setattr(notes, "_ask", ask_here)


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


def run_file(folder: Path, model: Path, tasks: Path, names: Sequence[str], has_text: bool = True, **settings: Any) -> Path:
    common = {"num_sequences": 4, "sequence_length": 64}
    harness = {
        "include_path": str(tasks), "num_fewshot": 1, "max_length": MAX_LENGTH, "tokens_per_shard": 400,
        "tokens_per_micro_batch": 90, "bootstrap_iters": BOOTSTRAP_ITERS,
    }  # fmt: skip
    text = {"data": str(TEXTS / "heldout-fiction.jsonl"), **common} if has_text else {}
    values = {
        "calibration": {"data": str(TEXTS / "calibration-fiction.jsonl"), **common},
        "evaluation": {"tasks": list(names), "harness": harness, **text},
        "clustering.num_experts": [3], "resources.layers_per_shard": 2, "export.max_file_bytes": "5 GB", **settings,
    }  # fmt: skip
    return write_run_file(folder, model, Path("unused"), values)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path, tasks: Path) -> FinishedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notes, "_ask", ask_here)
        return FinishedRun.of(run_file(tmp_path_factory.mktemp("run"), model, tasks, NAMES))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, done: FinishedRun, model: Path, tasks: Path) -> FinishedRun:
    """The same checkpoints as whole models, without a held-out text. Several requests at once: the harness pads prompts from
    the left, which moves roundings."""
    settings = {"backend": "hf", "batch_size": 4, "prompts_per_slice": 8}
    given = {f"evaluation.harness.{name}": value for name, value in settings.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notes, "_ask", ask_here)
        path = run_file(
            tmp_path_factory.mktemp("whole"), model, tasks, NAMES, has_text=False, run_dir=str(done.run_dir), **given
        )
        return FinishedRun.of(path)


def numbers(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Every number of the harness's results, by task and metric."""
    for task, row in rows.items():
        for key, value in row.items():
            if "," in key and isinstance(value, int | float):
                yield f"{task} {key}", value


def harness_results(done: FinishedRun, model: str) -> Any:
    """The harness's results of a model, also where a later run has published others."""
    return json.loads((done.run_dir / done.part("report").dir / "harness" / f"{model}.json").read_text())


@pytest.fixture(scope="module")
def by_the_command(done: FinishedRun, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Scores of the harness's own command on both exports."""
    folder = tmp_path_factory.mktemp("command")
    commands = []
    for export_format in ("stock", "tied"):
        trust = ",trust_remote_code=True" if export_format == "tied" else ""
        checkpoint = done.model(f"3e-{export_format}")
        options = {
            "model": "hf", "model_args": f"pretrained={checkpoint},dtype=float32,max_length={MAX_LENGTH}{trust}",
            "include_path": tasks, "num_fewshot": 1, "device": "cpu", "output_path": folder / export_format,
        }  # fmt: skip
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        commands.append(["run", *given, "--tasks", *NAMES[1:]])  # the group has the first one in it
    subprocess.run(
        [sys.executable, "-m", "tests.harness_command"], input=json.dumps(commands).encode(), check=True, capture_output=True,
        timeout=300, cwd=REPOSITORY,
    )  # fmt: skip
    found = {}
    for export_format in ("stock", "tied"):
        (path,) = (folder / export_format).rglob("results_*.json")
        found[export_format] = dict(numbers(json.loads(path.read_text())["results"]))
    return found


@pytest.mark.parametrize("export_format", ["stock", "tied"])
def test_streamed_and_whole_models_have_the_scores_of_the_harness_s_own_command(
    export_format: str, done: FinishedRun, whole: FinishedRun, by_the_command: Mapping[str, Mapping[str, float]]
) -> None:
    """Few words, and the generated text, by brier score, perplexity, bits per byte and chrF, which show any difference."""
    name, due = f"tiny-3e-{export_format}", by_the_command[export_format]
    for run in (done, whole):
        ours = dict(numbers(harness_results(run, name)["results"]))
        assert ours.keys() == due.keys() and len(due) > 15
        assert ours == pytest.approx(due, rel=1e-6, abs=1e-6)
    assert due["tiny_choice brier_score,none"] > 0.1 and due["tiny_answer chrf,none"] > 0.1
    assert due["tiny_word perplexity_stderr,none"] > 0
    default = inspect.signature(lm_eval.simple_evaluate).parameters["bootstrap_iters"].default
    assert Harness().bootstrap_iters == default, "what is left out is as the harness has it"


def test_whole_models_answer_slice_by_slice_and_tasks_need_no_text(whole: FinishedRun) -> None:
    units = [unit for unit in whole.recorder.units if unit.stage == "evaluate"]
    of_source = [unit.label.removeprefix("tiny, ") for unit in units if unit.label.startswith("tiny, ")]
    assert [label for label in of_source if label.startswith("tiny_answer")] == [
        *(f"tiny_answer, prompts {number}/3" for number in range(1, 4)), "tiny_answer, scores",
    ], "12 questions, each put twice"  # fmt: skip
    assert "tiny_choice, requests 2/" in " ".join(of_source)
    assert all((unit.hold is None) == (unit.name == "scores") for unit in units)
    assert {unit.stage for unit in whole.recorder.units} == {"requests", "evaluate", "report"}
    assert not any("perplexity" in one for one in whole.report["models"])
    text = CliRunner().invoke(app, ["compare", str(whole.run_file), "--format", "markdown"]).stdout
    assert text.startswith("| model | tiny_choice (acc) |"), "no table of perplexities that there are not"


class StandIn:
    """In the place of lm-evaluation-harness's class for vLLM, which cannot be imported here: transformers answers."""

    num_open: ClassVar[int] = 0

    def __new__(cls, pretrained: str, trust_remote_code: bool, tensor_parallel_size: int, dtype: str, max_length: int) -> Any:
        from lm_eval.models.huggingface import HFLM

        assert (trust_remote_code, tensor_parallel_size, dtype) == (False, 1, "float32")
        assert cls.num_open == 0, "a GPU has no room for two engines"
        cls.num_open += 1
        lm = HFLM(pretrained=pretrained, dtype=dtype, device="cpu", max_length=max_length)
        lm._model.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=cls.shut_down))
        return lm

    @classmethod
    def shut_down(cls) -> None:
        cls.num_open -= 1


def test_an_engine_answers_what_is_asked_and_ends(
    done: FinishedRun, tmp_path: Path, model: Path, tasks: Path, by_the_command: Mapping[str, Mapping[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """vLLM itself is not there: this tells that requests reach the harness's class for it, and answers their scores."""
    from stages.evaluate import backends
    from stages.harness import engine

    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", SimpleNamespace(VLLM=StandIn))
    freed: list[None] = []
    cleanup = SimpleNamespace(cleanup_dist_env_and_memory=lambda: freed.append(None))
    monkeypatch.setitem(sys.modules, "vllm.distributed", cleanup)
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    monkeypatch.setattr(backends, "packages_distributions", lambda: {"vllm": ["torch"]})
    settings = {"evaluation.harness.backend": "vllm", "run_dir": str(done.run_dir)}
    names = ["tiny_choice", "tiny_answer"]
    path = run_file(tmp_path, model, tasks, names, has_text=False, **settings)
    monkeypatch.setattr(engine, "entry_points", lambda group: [])
    with pytest.raises(InputError, match=r"vllm, which runs tied exports such as tiny-3e-tied with hcsmoe's plug-in alone, "):
        FinishedRun.of(path)
    monkeypatch.setattr(engine, "entry_points", lambda group: [SimpleNamespace(dist=SimpleNamespace(name="hcsmoe"))])
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"tiny-3e-tied: .* exports of Other, .* a MixtralFor"):
        patch.setattr(backends, "TIED_CLASSES", {"HCSMoEOther": ""})
        FinishedRun.of(path)
    monkeypatch.setattr(engine, "entry_points", lambda group: [])
    stock = FinishedRun.of(path, ["export.formats=[stock]"])
    units = [unit for unit in stock.recorder.units if unit.stage == "evaluate"]
    assert {unit.hold.key.rpartition(":")[2] for unit in units if unit.hold} == {"vllm"}
    assert StandIn.num_open == 0 and len(freed) == 2, "both engines have ended"
    ours = dict(numbers(harness_results(stock, "tiny-3e-stock")["results"]))
    assert len(ours) > 8 and ours == pytest.approx({key: by_the_command["stock"][key] for key in ours}, rel=1e-6, abs=1e-6)
    assert harness_results(stock, "tiny-3e-stock")["config"]["model"] == "vllm"
    plugin = SimpleNamespace(dist=SimpleNamespace(name="hcsmoe"))
    monkeypatch.setattr(engine, "entry_points", lambda group: [plugin] if group == "vllm.general_plugins" else [])
    out = CliRunner().invoke(app, ["plan", str(path)], terminal_width=400).stdout
    assert "backend      tiny_choice: vllm, as evaluation.harness.backend says" in out


def test_requests_are_made_once_and_each_layer_is_loaded_once_for_all_tasks(done: FinishedRun) -> None:
    units = done.recorder.units
    assert sum(unit.stage == "requests" for unit in units) == len(NAMES)
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
    more = FinishedRun.of(done.run_file, ["evaluation.tasks=[tiny_rolling, tiny_choice]"])
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
        shares = [row["scores"][name]["value"] for name in ("tiny_choice", "tiny_answer", "tiny_group")]
        assert row["average"] == pytest.approx(sum(shares) / 3), "perplexities do not count"
        assert row["retained"] == pytest.approx(row["average"] / rows[0]["average"])
    text = CliRunner().invoke(app, ["compare", str(done.run_file), "--format", "markdown"]).stdout
    assert "| model | tiny_choice (acc) | tiny_rolling (word_perplexity) | tiny_answer (exact_match) |" in text
    table = TaskTable.of(done.report)
    assert table is not None and f"{rows[1]['average']:.4f}" in table.cells(rows[1]["model"])


def test_a_task_that_raises_fails_alone_and_is_tried_again(done: FinishedRun, tmp_path: Path, model: Path, tasks: Path) -> None:
    """Also one whose requests cannot be made, and one that the model cannot answer. All other scores stand; the exit code is
    not 0; the next run tries it alone."""
    names = ["tiny_choice", "tiny_broken", "tiny_mute", "tiny_long"]
    path = run_file(tmp_path, model, tasks, names, **{"export.formats": ["stock"], "run_dir": str(done.run_dir)})
    found = CliRunner().invoke(app, ["run", str(path), "--executor", "local"])
    assert isinstance(found.exception, RunFailed), "which `main` turns into exit code 1"
    lines = [line.partition(" (1000)")[0] for line in str(found.exception).splitlines()]
    models = ("tiny", "tiny-3e-stock")
    assert lines == [
        "requests tiny_mute requests: KeyError: 'no question'",
        *(f"evaluate {name}, tiny_long, prompts 1/1: AssertionError: Invalid configuration: requested max tokens to generate"
          for name in models),
        *(f"evaluate {name}, {line}" for name in models
          for line in ("tiny_broken, scores: ValueError: this task is broken",
                       "tiny_long, scores: 1 of 1 files of answers are missing: texts-0000.arrow")),
        "report report.json: it lacks 6 of 8 scores of tasks",
        "all else is finished; try these again by the same command",
    ]  # fmt: skip
    report = json.loads((done.run_dir / "report.json").read_text())
    assert [set(one["tasks"]) for one in report["models"]] == [{"tiny_choice"}] * 2
    assert {(one["model"], one["task"]) for one in report["failed_tasks"]} == {
        (name, task) for name in models for task in ("tiny_broken", "tiny_mute", "tiny_long")
    }
    table = TaskTable.of(report)
    assert table is not None and table.average("tiny") is None, "an average over fewer tasks would pass for one over all"
    result, recorder = execute(load_config(path, []))
    assert len(result.shortfalls) == 8
    assert {f"{unit.stage} {unit.label}" for unit in recorder.units} == {line.split(": ")[0] for line in lines[:8]}


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
        (
            ["tiny_choice"],
            {"backend": "vllm"},
            r"backend is vllm, which is not installed; install it, or use streamed, hf or auto",
        ),
        (["../x"], {}, r"'\.\./x' is no name of a task"),
        (["tiny_answer"], {"worker_memory": "12 MB"}, r"evaluation\.tasks \(tiny_answer\) needs a whole model in one worker"),
    ],
)
def test_what_cannot_be_scored_is_one_line_before_anything_runs(
    tmp_path: Path, model: Path, tasks: Path, names: list[str], settings: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place = {"worker_memory": "resources"}
    given = {f"{place.get(name, 'evaluation.harness')}.{name}": value for name, value in settings.items()}
    looked_at = without_the_harness_s_own(monkeypatch)
    path = run_file(tmp_path, model, tasks, names, has_text=False, **given)
    found = CliRunner().invoke(app, ["plan", str(path)])
    assert isinstance(found.exception, InputError)
    assert "\n" not in str(found.exception)
    with pytest.raises(InputError, match=message):
        raise found.exception
    if "tiny_chioce" in names:
        assert looked_at[-1] is True, "a name that the folder lacks is looked for among the harness's own"


def without_the_harness_s_own(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the harness's own tasks were to be listed, which takes ten seconds; they are not."""
    from stages.harness import tasks

    looked_at: list[bool] = []
    known = tasks.TaskManager

    def manager(include_path: str | None, include_defaults: bool) -> Any:
        looked_at.append(include_defaults)
        return known(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", manager)
    return looked_at


def test_code_of_a_model_runs_only_with_the_harness_s_own_permission(
    done: FinishedRun, tmp_path: Path, model: Path, tasks: Path
) -> None:
    settings = {
        "evaluation.harness.confirm_run_unsafe_code": True, "evaluation.harness.limit": 2, "export.formats": ["stock"],
        "run_dir": str(done.run_dir),
    }  # fmt: skip
    again = FinishedRun.of(run_file(tmp_path, model, tasks, ["tiny_unsafe"], **settings))
    assert again.report["models"][0]["tasks"]["tiny_unsafe"]["num_documents"] == 2


def test_plan_says_what_each_task_needs_how_much_it_reads_and_who_answers(
    done: FinishedRun, tmp_path: Path, model: Path, tasks: Path
) -> None:
    path = run_file(tmp_path, model, tasks, ["tiny_group", "tiny_answer", "tiny_mute"], has_text=False)
    out = CliRunner().invoke(app, ["plan", str(path)], terminal_width=400).stdout
    facts = {name: sealed.facts for unit in done.view.units("requests") if (sealed := done.view.sealed(unit))
             for name in NAMES if done.part("requests", name).dir == unit.part_dir}  # fmt: skip
    read = facts["tiny_group"]["num_tokens"]
    assert isinstance(read, int)
    line = "task         tiny_group: 24 documents of json; loglikelihood, multiple_choice; 2 tasks; a model reads about "
    assert f"{line}{read:,} tokens\n" in out, "fewer documents than are looked at: the estimate is exact"
    assert "task         tiny_answer: 12 documents of json; generate_until; a model reads about " in out
    assert f" tokens, and generates at most {12 * 2 * 5}\n" in out
    assert "multiple_choice; its first documents raise KeyError: 'no question'\n" in out
    assert "tasks take 3 models about " in out and "generated tokens come one after another" in out
    assert "backend      tiny_group: streamed, since it needs log-likelihoods alone" in out
    assert "backend      tiny_answer: hf, since it generates text" in out
    assert "3 x 3 tasks" in out and "scores" not in out


def test_another_process_is_asked_what_tasks_need(tmp_path: Path, model: Path, tasks: Path) -> None:
    """So that the driver loads neither the harness nor data."""
    config = load_config(run_file(tmp_path, model, tasks, ["tiny_choice", "tiny_gone"]), [])
    question = notes.Question(tuple(task_args(config)), str(model))
    answer = ask_process(question)
    assert answer == ask_here(question)
    assert set(answer.notes) == {"tiny_choice"} and set(answer.missing) == {"tiny_gone"}
