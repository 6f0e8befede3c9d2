"""What a run directory may be, and what is deleted in it: only what this program has made there, and never through a link."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checks import check
from pipeline.commands.clean import describe_unused, remove_unused
from pipeline.config import load_config
from pipeline.driver.selection import delete, sweep
from pipeline.errors import RunFailed
from pipeline.run.run_dir import check_run_dir
from pipeline.run.view import RunView
from stages.contracts.errors import InputError
from stages.contracts.keys import key_of
from tests.runs import Call, FinishedRun, digests, write_run_file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path], token_ids: Path) -> FinishedRun:
    folder = tmp_path_factory.mktemp("base")
    model = shutil.copytree(tiny_checkpoint("mixtral"), folder / "model")
    return FinishedRun.of(write_run_file(folder, model, token_ids, {"evaluation": None}))


@pytest.fixture
def copy(tmp_path: Path, base: FinishedRun) -> FinishedRun:
    """A finished run that a test may change, and a copy of its model beside it."""
    return base.copied(tmp_path)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody else's with what a run would delete, were it its own."""
    folder = tmp_path / "outside"
    for name in ("hidden/layer-0001/tokens-0000.safetensors", "partial/x", ".tmp-0123-x", "manifests/a.json", "identity.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("theirs")
    return folder


def checked(run_file: Path, *settings: str) -> None:
    config = load_config(run_file, list(settings))
    check_run_dir(RunView(config, check(config).inputs))


# run directory and model


@pytest.mark.parametrize("where", ["model", "model/run", "model/a/b", "link/run"])
def test_a_run_directory_that_is_the_models_folder_or_lies_in_it_is_refused(copy: FinishedRun, call: Call, where: str) -> None:
    folder = copy.run_file.parent
    (folder / "link").symlink_to("model")
    before = digests(folder / "model")
    settings = ("--set", f"run_dir={folder / where}", "--set", f"model={folder / 'model'}")
    code, _, err = call("run", str(copy.run_file), "--executor", "local", *settings)
    run_dir = folder / where.replace("link", "model")
    verb = "is" if where == "model" else "lies in"
    assert (code, err) == (
        2,
        f"error: run_dir {run_dir} {verb} the model's folder {folder / 'model'}, whose files are exported with the model; "
        "give a folder elsewhere\n",
    )
    assert digests(folder / "model") == before


def test_a_model_in_a_folder_that_the_run_writes_to_is_refused(copy: FinishedRun) -> None:
    inside = copy.run_dir / copy.part("calibrate").dir / "model"
    shutil.copytree(copy.source, inside)
    with pytest.raises(InputError, match=r"model .*/calibrate-[0-9a-f]{12}/model lies in .*, which this run writes to"):
        checked(copy.run_file, f"model={inside}")


def test_a_model_below_the_run_directory_is_fine(copy: FinishedRun) -> None:
    moved = (copy.run_file.parent / "model").rename(copy.run_dir / "model")
    checked(copy.run_file, f"model={moved}")


def test_a_source_that_an_earlier_run_left_there_works_and_is_not_cleaned_away(copy: FinishedRun) -> None:
    name = f"{copy.config.name}-3e-stock"
    source = copy.run_dir / "models" / name
    before = digests(source)
    settings = [f"model={source}", "clustering.num_experts=[2]"]
    again = FinishedRun.of(copy.run_file, settings)
    assert again.source == copy.model("3e-stock"), "the link leads to the folder that was read"
    kept = again.results()
    lines = list(remove_unused(copy.run_dir))
    assert not [line for line in lines if again.source.parent.name in line]
    assert copy.part("calibrate").dir in "".join(lines)
    assert digests(source) == before, "the name leads there still"
    assert again.results() == kept
    assert FinishedRun.of(copy.run_file, settings).recorder.units == []


# links


@pytest.mark.parametrize("part", ["", "hidden", "partial", "manifests"])
@pytest.mark.parametrize("options", [[], ["--from", "calibrate"]])
def test_a_run_deletes_nothing_through_a_link(
    copy: FinishedRun, outside: Path, call: Call, part: str, options: list[str]
) -> None:
    path = copy.run_dir / copy.part("calibrate").dir / part
    if path.exists():
        shutil.move(path, copy.run_file.parent / "aside")
    path.symlink_to(outside / part)
    before = digests(outside)
    code, _, err = call("run", str(copy.run_file), "--executor", "local", *options)
    assert (code, err) == (
        2,
        f"error: {path} is a link; a run deletes files in this folder, and never through links: put a real folder in its "
        "place, or remove the link\n",
    )
    assert digests(outside) == before


def test_deeper_links_are_not_followed_either(copy: FinishedRun, outside: Path) -> None:
    folder = copy.run_dir / copy.part("calibrate").dir
    before = digests(outside)
    (folder / "hidden").mkdir()
    (folder / "hidden" / "layer-0001").symlink_to(outside / "hidden" / "layer-0001")
    (folder / "deep").symlink_to(outside)
    with pytest.raises(InputError, match="layer-0001 is a link"):
        delete(copy.run_dir, [f"{folder.name}/hidden/layer-0001/tokens-0000.safetensors"])
    sweep(copy.run_dir, [folder.name], ["hidden"])
    assert not (folder / "hidden").exists()
    assert digests(outside) == before


def test_clean_removes_nothing_through_links_and_no_link(copy: FinishedRun, outside: Path) -> None:
    new = FinishedRun.of(copy.run_file, ["clustering.linkage=single"])
    before = digests(outside)
    old = copy.run_dir / copy.part("cluster").dir
    identity = (old / "identity.json").read_text()
    shutil.rmtree(old)
    old.symlink_to(outside)
    (outside / "identity.json").write_text(identity)
    before = digests(outside)
    inner = copy.run_dir / copy.part("merge", copy.view.targets[0].part).dir / "inner"
    inner.symlink_to(outside)
    lines = list(remove_unused(copy.run_dir))
    assert inner.parent.name in "".join(lines) and not inner.parent.exists()
    assert old.name not in "".join(lines) and old.is_symlink()
    assert digests(outside) == before
    assert new.results()


# whose folders are removed


def test_clean_removes_only_folders_that_stages_have_made(copy: FinishedRun) -> None:
    """Not what merely holds an `identity.json`."""
    FinishedRun.of(copy.run_file, ["clustering.linkage=single"])
    identity = {"stage": "cluster", "settings": {"linkage": "x"}}
    contents = {
        "mine": identity,
        "cluster-000000000000": identity,
        "other-" + key_of(identity): identity,
        "merge-" + key_of({"stage": "x"}) + "0": {"stage": "x"},
        "cluster-0123456789ab": ["a list"],
    }
    for name, content in contents.items():
        (copy.run_dir / name).mkdir()
        (copy.run_dir / name / "identity.json").write_text(json.dumps(content))
    (copy.run_dir / "cluster-ffffffffffff").mkdir()
    os.mkfifo(copy.run_dir / "cluster-ffffffffffff" / "identity.json")
    (copy.run_dir / "models" / "theirs").symlink_to("/not/mounted/now")
    (copy.run_dir / "models" / "own").mkdir()
    listed = list(describe_unused(copy.run_dir))
    removed = list(remove_unused(copy.run_dir))
    assert [f"{line}  removed" for line in listed[:-1]] == removed[:-1]
    assert listed[-1] == f"{len(removed) - 1} directories not used by the last run; --yes removes them"
    assert {line.split()[0].rsplit("-", 1)[0] for line in removed[:-1]} >= {"cluster", "report", "merge-3e-tied"}
    assert all((copy.run_dir / name).exists() for name in (*contents, "cluster-ffffffffffff", "models/own"))
    assert (copy.run_dir / "models" / "theirs").is_symlink()


def test_clean_takes_what_is_used_from_the_record_not_from_the_versions_of_today(
    copy: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `clean` with another version of torch would remove all that the last run has made."""
    monkeypatch.setattr("pipeline.run.view.library_version", lambda name: "99.1")
    assert list(remove_unused(copy.run_dir)) == ["0 directories removed"]


def test_clean_says_what_it_could_not_remove_and_finds_it_again(
    copy: FinishedRun, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    FinishedRun.of(copy.run_file, ["merging.method=average"])
    unlink = os.unlink

    def refusing(path: object, *rest: object, **options: object) -> None:
        if str(path).endswith("model.safetensors.index.json"):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *rest, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refusing)
        code, _, err = call("clean", str(copy.run_dir), "--yes")
    assert code == 1
    assert err.startswith("failed: [Errno 13] Permission denied: ") and err.count("\n") == 1
    assert not (copy.run_dir / "driver.lock").exists()
    (line,) = [line for line in describe_unused(copy.run_dir) if line.startswith("assemble-3e-stock")]
    assert f"{line}  removed" in list(remove_unused(copy.run_dir))


def test_clean_locks_before_it_looks(copy: FinishedRun, call: Call) -> None:
    FinishedRun.of(copy.run_file, ["clustering.linkage=single"])
    (copy.run_dir / "driver.lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "now", "token": "0f"}))
    code, _, err = call("clean", str(copy.run_dir), "--yes")
    assert code == 2 and "is in use by another driver: host elsewhere, pid 7, since now" in err
    assert (copy.run_dir / copy.part("cluster").dir).exists()


# where a run cannot write


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    (folder / "run").mkdir(parents=True)
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder / "run")], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting takes root")
    yield folder / "run"
    subprocess.run(["umount", "-l", str(folder / "run")], check=True)


def test_a_read_only_file_system_is_noticed_before_anything_runs(copy: FinishedRun, call: Call, read_only: Path) -> None:
    for run_dir in (read_only, read_only / "deeper"):
        code, _, err = call("run", str(copy.run_file), "--executor", "local", "--set", f"run_dir={run_dir}")
        assert (code, err) == (
            1,
            f"failed: {run_dir} cannot be written to: {read_only} is read-only for user {os.geteuid()}; change its permissions "
            "or give another run_dir\n",
        )


def test_a_folder_without_permission_is_noticed_before_anything_runs(
    copy: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, models = os.access, copy.run_dir / "models"
    monkeypatch.setattr(os, "access", lambda path, mode, **options: path != models and real(path, mode, **options))
    with pytest.raises(RunFailed) as refused:
        checked(copy.run_file)
    assert str(refused.value) == (
        f"{models} cannot be written to: {models} is read-only for user {os.geteuid()}; change its permissions or give another "
        "run_dir"
    )


@pytest.mark.parametrize("name", ["", "models"])
def test_a_file_in_the_place_of_a_folder_is_noticed_before_anything_runs(copy: FinishedRun, call: Call, name: str) -> None:
    run_dir = copy.run_file.parent / "new"
    path = run_dir / name if name else run_dir
    path.parent.mkdir(exist_ok=True)
    path.write_text("a file")
    assert call("run", str(copy.run_file), "--executor", "local", "--set", f"run_dir={run_dir}")[::2] == (
        1,
        f"failed: {path} cannot be written to: {path} is not a folder; give another run_dir or move it away\n",
    )
    assert [found for found in run_dir.rglob("*") if found != path] == []


@pytest.mark.parametrize("name", ["run.json", "events.jsonl", "report.json", "report.html"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")], ids=["folder", "pipe", "link"])
def test_what_is_no_file_in_the_place_of_a_file_is_noticed_before_anything_runs(
    copy: FinishedRun, call: Call, name: str, make: Callable[[Path], object]
) -> None:
    path = copy.run_dir / name
    path.unlink()
    make(path)
    assert call("run", str(copy.run_file), "--executor", "local")[::2] == (
        2,
        f"error: {path} is no regular file; remove it, a file of the run goes there\n",
    )


def test_a_folder_of_somebody_elses_under_the_name_of_a_model_is_noticed_before_anything_runs(
    copy: FinishedRun, call: Call
) -> None:
    path = copy.run_dir / "models" / f"{copy.config.name}-3e-tied"
    path.unlink()
    path.mkdir()
    assert call("run", str(copy.run_file), "--executor", "local")[::2] == (
        2,
        f"error: {path} is not a link that an earlier run has made; move it away, the model goes there\n",
    )


def test_a_batch_goes_on_past_a_run_directory_that_cannot_be_written(copy: FinishedRun, call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    batch = tmp_path / "batch.yaml"
    runs = f"[{{run: {copy.run_file}}}, {{run: {copy.run_file}, set: {{run_dir: {tmp_path / 'file'}}}}}]"
    batch.write_text(f"batch_dir: {tmp_path / 'batch'}\nruns: {runs}\n")
    code, _, err = call("batch", str(batch), "--executor", "local")
    assert code == 1
    assert f"[2] refused: {tmp_path / 'file'} cannot be written to: {tmp_path / 'file'} is not a folder" in err
    errors = [record["error"] for record in json.loads((tmp_path / "batch" / "batch.json").read_text())["runs"]]
    assert errors[0] is None and "cannot be written to" in errors[1]


def test_targets_whose_names_would_be_one_are_refused(copy: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.contracts.targets._target_label", lambda num_experts, width: "5.25e-1f3a")
    with pytest.raises(InputError, match=r"num_experts has two targets whose name would be model-5\.25e-1f3a-tied; run them"):
        checked(copy.run_file, "clustering.num_experts=[3, 2]")
