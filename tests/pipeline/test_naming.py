"""What exports are called, and what a published card says of its source."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import load_config
from stages.contracts.errors import InputError
from stages.contracts.naming import hub_name, model_name
from stages.contracts.settings import RunConfig
from stages.io.storage import absolute
from tests.runs import FinishedRun, write_run_file
from tests.tiny import load, save_checkpoint, save_token_ids

SNAPSHOT = "hub/models--org--Tiny-8x7B-v0.1/snapshots/0123abc"


@pytest.mark.parametrize(
    ("model", "name", "hub"),
    [
        ("org/Tiny-v0.1", "Tiny-v0.1", "org/Tiny-v0.1"),
        ("/models/tiny", "tiny", None),
        ("/models/tiny/", "tiny", None),
        ("/models/tiny/.", "tiny", None),
        ("/models/other/../tiny", "tiny", None),
        (".", "here", None),
        ("./", "here", None),
        ("below", "below", None),
        ("below/..", "here", None),
        ("~/mine", "mine", None),
        ("~no-such-user/mine", "mine", None),
        ("link", "link", None),
        ("..", "parent", None),
        ("/", "model", None),
        (f"/{SNAPSHOT}", "Tiny-8x7B-v0.1", "org/Tiny-8x7B-v0.1"),
        (f"/{SNAPSHOT}/", "Tiny-8x7B-v0.1", "org/Tiny-8x7B-v0.1"),
        ("/hub/models--tiny/snapshots/0123abc", "tiny", "tiny"),
        ("s3://bucket/models/tiny/", "tiny", None),
        ("s3://bucket/snapshots/tiny", "tiny", None),
    ],
)
def test_a_model_is_called_as_on_the_hub_or_as_its_folder(
    model: str, name: str, hub: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "parent" / "here"
    (here / "below").mkdir(parents=True)
    (here / "link").symlink_to("below")
    monkeypatch.chdir(here)
    assert (model_name(model), hub_name(model)) == (name, hub)


def run_config(**values: Any) -> RunConfig:
    settings = {"run_dir": "run", "calibration": {"data": "x.txt"}, "clustering": {"num_experts": 4}, **values}
    return RunConfig.model_validate(settings)


def test_a_name_is_settled_once_and_may_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    recorded = run_config(model=".").model_dump(mode="json")
    monkeypatch.chdir(tmp_path)  # status is asked from elsewhere
    assert RunConfig.model_validate(recorded).name == "here"
    assert run_config(model=".", name="Small Mixtral+v2").name == "Small Mixtral+v2"


BAD = ["", ".hidden", "-r", "a/b", "..", "a\\b", "a[b]", "a*", "a\nb", "a\x1b[31m", "a ", "a" * 97, "\u00e4" * 49, '"a"', "a:b"]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_is_no_safe_part_of_a_path_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, tmp_path / "model", tmp_path / "x.npy", {"name": name})
    with pytest.raises(InputError) as caught:
        load_config(run_file, [])
    assert str(caught.value) == (
        f"{run_file}: exports would be called {name!r}; a name begins with a letter or digit, goes on with letters, digits, "
        f"spaces and . _ + -, and takes at most 96 bytes: set name"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["a[b]", "a\nb", ".hidden"])
def test_a_folder_of_an_odd_name_exits_with_2_and_runs_under_another(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = write_run_file(tmp_path, tmp_path / folder, save_token_ids(tmp_path / "ids.npy"), {})
    monkeypatch.setattr(sys, "argv", ["hcsmoe", "run", str(run_file), "--executor", "local"])
    with pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith(f"error: {run_file}: exports would be called {folder!r}; ")
    assert load_config(run_file, ["name=plain"]).name == "plain"


@pytest.mark.parametrize("name", ["Tiny Model v2", "\u5c0f\u6a21\u578b", "1+1"])
def test_a_name_that_is_allowed_runs_and_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / name, "mixtral")
    monkeypatch.chdir(tmp_path / name)
    settings = {"model": ".", "export.formats": ["tied"], "evaluation": None}
    run_file = write_run_file(tmp_path / "files", Path(), save_token_ids(tmp_path / "ids.npy"), settings)
    done = FinishedRun.of(run_file)
    (model,) = (absolute(done.config.run_dir) / "models").iterdir()
    assert model.name == f"{name}-3e-tied"
    assert type(load(model, trust_remote_code=True)).__name__ == "HCSMoEMixtralForCausalLM"
    card = (model / "README.md").read_text()
    assert f"# {name}-3e-tied\n\n{name} with 6 experts" in card and str(tmp_path) not in card
