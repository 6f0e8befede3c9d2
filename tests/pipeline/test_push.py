"""`push`, to a stand-in for the hub on this machine; in processes of their own, since HF_ENDPOINT is read at import."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from pipeline.api.results import Report
from pipeline.commands.push import Told, files_of, push
from pipeline.config import read_config
from pipeline.display.quality_picture import Point, quality_picture
from stages.contracts.errors import InputError
from tests.conftest import REPOSITORY
from tests.pipeline.upload_server import TOKEN, UploadHub, serve_uploads
from tests.runs import FinishedRun, digests

NAME = "tiny-mixtral-3e-tied"


@pytest.fixture
def done(finished_run: Callable[[str], FinishedRun]) -> FinishedRun:
    return finished_run("mixtral")


def call(hub: UploadHub, home: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE")
    command = [sys.executable, "-m", "pipeline", "push", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_an_upload_that_was_cut_off_goes_on_and_leaves_nothing_behind(done: FinishedRun, tmp_path: Path) -> None:
    """The token is found in no file and no line; the sealed checkpoint stays as it is."""
    before = digests(done.run_dir)
    sizes = sorted(path.stat().st_size for path in done.model("3e-tied").glob("*.safetensors"))
    assert len(sizes) > 3
    with serve_uploads(UploadHub()) as hub:
        given = (str(done.run_dir), NAME, "org/smaller", "--license", "apache-2.0", "--private")
        refused = call(hub, tmp_path, *given, token="hf_wrong")
        assert refused.returncode == 2 and "org/smaller cannot be written to: " in refused.stderr
        assert "hf auth login" in refused.stderr and hub.repos == {}
        hub.num_until_away = 2
        cut = call(hub, tmp_path, *given)
        assert cut.returncode == 1 and "the same command continues the upload" in cut.stderr
        assert hub.repos == {"org/smaller": {}}, "nothing is seen of half a model"
        num_before, hub.num_until_away = len(hub.received), None
        assert num_before >= 2
        ended = call(hub, tmp_path, *given)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == f"{hub.url}/org/smaller\n"
        assert sorted(hub.received) == sizes, "each file is sent once"
        assert hub.visibility == {"org/smaller": "private"}
    files = hub.repos["org/smaller"]
    source = {path.name: path.read_bytes() for path in done.model("3e-tied").iterdir()}
    assert files.keys() == source.keys() | {"quality.svg", "run.yaml"}
    assert {name: files[name] for name in source if name != "README.md"} == {
        k: v for k, v in source.items() if k != "README.md"
    }
    assert digests(done.run_dir) == before
    for text in (refused.stdout, refused.stderr, cut.stdout, cut.stderr, ended.stdout, ended.stderr):
        assert TOKEN not in text
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path for path in kept if TOKEN.encode() in path.read_bytes()] == []


def test_the_card_has_the_scores_and_the_run_file(done: FinishedRun) -> None:
    files = files_of(Report.of(done.run_dir), NAME, "org/smaller", Told(licence="mit"))
    text = files["README.md"]
    assert isinstance(text, bytes)
    card = ModelCard(text.decode())
    values = card.data.to_dict()
    row = next(model for model in done.report["models"] if model["name"] == NAME)
    ((model,),) = [values["model-index"]]
    (result,) = model["results"]
    assert model["name"] == NAME and values["license"] == "mit" and "hcsmoe" in values["tags"]
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"]["name"] == Path(done.config.evaluation.data[0]).name  # type: ignore[union-attr]
    assert [(one["type"], one["value"]) for one in result["metrics"]] == [("perplexity", row["perplexity"])]
    assert 'from_pretrained("org/smaller", trust_remote_code=True)' in card.text and "(quality.svg)" in card.text
    assert str(done.run_dir) not in text.decode() and str(done.source.parent) not in text.decode()
    settings = yaml.safe_load(files["run.yaml"])  # type: ignore[arg-type]
    assert read_config(settings).clustering.num_experts == (3,)


def edited(done: FinishedRun, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of the report, and of one checkpoint."""
    report = json.loads((done.run_dir / "report.json").read_text())
    edit(report)
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    shutil.copytree(done.model("3e-tied"), folder / "models" / NAME)
    return folder


def test_what_is_not_whole_is_refused(done: FinishedRun, tmp_path: Path) -> None:
    told = Told(licence="mit")

    def refuses(folder: Path, message: str, told: Told = told, name: str = NAME) -> None:
        with pytest.raises(InputError, match=message):
            push(str(folder), name, "org/smaller", False, told)

    run = edited(done, tmp_path / "failed", lambda report: report.update(failed_tasks=[{"task": "arc", "model": NAME}]))
    refuses(run, "lacks 1 scores of tasks; run again, or push with --incomplete")
    assert "README.md" in files_of(Report.of(run), NAME, "org/smaller", Told(licence="mit", incomplete=True))
    refuses(run, "has no entry for a licence.* give --license ID, or --no-license", Told(incomplete=True))
    assert files_of(Report.of(run), NAME, "o/r", Told(without_licence=True, incomplete=True))
    refuses(run, "has made no model named other; its models: ", name="other")
    run = edited(done, tmp_path / "cut", lambda report: None)
    file = max((run / "models" / NAME).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    refuses(run, file.name)
    file.unlink()
    refuses(run, file.name)
    refuses(tmp_path, "report.json does not exist; a run writes it when all stages are finished")
    for repo in ("smaller", "a/b/c", "org/with space"):
        with pytest.raises(InputError, match="is no name of a repository"):
            push(str(done.run_dir), NAME, repo, False, told)


def test_without_perplexities_there_is_no_picture(done: FinishedRun, tmp_path: Path) -> None:
    def forget(report: dict[str, Any]) -> None:
        for model in report["models"]:
            model.pop("perplexity")

    files = files_of(Report.of(edited(done, tmp_path / "run", forget)), NAME, "org/smaller", Told(licence="mit"))
    assert "quality.svg" not in files and b"model-index" not in files["README.md"]  # type: ignore[operator]


def test_the_picture_has_every_model_where_it_belongs() -> None:
    points = [
        Point("source", 100, 10.0, "source"), Point("<b>&", 50, 20.0, "this"), Point("other", 75, 40.0, "other"),
    ]  # fmt: skip
    root = ET.fromstring(quality_picture(points))
    circles = [one for one in root.iter() if one.tag.endswith("circle")]
    xs, ys = ([float(one.attrib[name]) for one in circles] for name in ("cx", "cy"))
    assert xs[1] < xs[2] < xs[0] and ys[2] < ys[1] < ys[0], "larger to the right, worse upwards"
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11), "equal ratios of perplexity are equally far apart"
    assert [one.text for one in root.iter() if one.attrib.get("font-weight")] == ["<b>&"]
    ET.fromstring(quality_picture(points[:1]))
