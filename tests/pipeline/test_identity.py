"""Keys: what a result depends on, and nothing else."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline import __version__
from pipeline.checks import check
from pipeline.commands.status import describe_status
from pipeline.config import load_config
from pipeline.hub_data import is_dataset_name
from pipeline.run import view
from pipeline.run.identity import differences, files_identity
from pipeline.run.view import RunView
from stages.contracts.errors import InputError
from stages.contracts.keys import key_of
from stages.registry import stage_specs
from tests.conftest import REPOSITORY
from tests.runs import FinishedRun, write_run_file
from tests.test_architecture import imported
from tests.tiny import save_token_ids

ALL = {
    "prepare-model", "prepare-calibration", "prepare-evaluation", "calibrate", "cluster", "evaluate-source", "report",
    "cluster-3e-tied", "cluster-3e-stock", "merge-3e-tied", "merge-3e-stock", "assemble-3e-tied", "assemble-3e-stock",
    "evaluate-3e-tied", "evaluate-3e-stock",
}  # fmt: skip
EVALUATES = {"evaluate-source", "evaluate-3e-tied", "evaluate-3e-stock"}
OF_TARGETS = {name for name in ALL if "-3e-" in name}
OF_STOCK = {name for name in ALL if name.endswith("-stock")}
AFTER_CALIBRATION = {"prepare-calibration", "calibrate", "cluster", "report", *OF_TARGETS}

CHANGES: dict[str, set[str]] = {
    "calibration.seed=1": AFTER_CALIBRATION,
    "calibration.num_sequences=4": AFTER_CALIBRATION,
    "calibration.tokens_per_micro_batch=32": AFTER_CALIBRATION,
    "calibration.tokens_per_shard=64": AFTER_CALIBRATION,
    "clustering.linkage=single": {"cluster", "report", *OF_TARGETS},
    "merging.method=average": {"report", *OF_TARGETS},
    "export.router=dominant": {"report", *OF_STOCK},
    "export.max_file_bytes=70000": {"report", *OF_TARGETS} - {"cluster-3e-tied", "cluster-3e-stock"},
    "evaluation.num_sequences=4": {"prepare-evaluation", "report", *EVALUATES},
    "resources.num_workers=2": set(),
    "resources.layers_per_shard=1": set(),
    "resources.worker_memory=1 GB": set(),
    "resources.num_gpus=0.5": set(),
    "resources.max_attempts=5": set(),
}


LIBRARIES: dict[str, set[str]] = {
    "transformers": ALL,
    "tokenizers": ALL,
    "numpy": ALL,
    "torch": {"calibrate", "cluster", "report", *EVALUATES, *OF_TARGETS},
    "scipy": {"cluster", "report", *OF_TARGETS},
    "pyarrow": set(),
}


@pytest.fixture
def run_file(tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path) -> Path:
    model = shutil.copytree(tiny_checkpoint("mixtral"), tmp_path / "model")
    data = shutil.copy(token_ids, tmp_path / "ids.npy")
    return write_run_file(tmp_path, model, Path(data), {})


def keys(run_file: Path, *settings: str) -> Mapping[str, str]:
    config = load_config(run_file, list(settings))
    return {part.full_name: part.key for part in RunView(config, check(config).inputs).all_parts()}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_every_stage_of_a_run_has_a_key(run_file: Path) -> None:
    assert set(keys(run_file)) == ALL
    assert keys(run_file) == keys(run_file)


@pytest.mark.parametrize("setting", CHANGES)
def test_a_setting_changes_the_stages_that_depend_on_it_and_no_other(run_file: Path, setting: str) -> None:
    assert changed(keys(run_file), keys(run_file, setting)) == CHANGES[setting]


@pytest.mark.parametrize("library", LIBRARIES)
def test_another_version_of_a_library_changes_the_stages_that_it_computes(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    before, installed = keys(run_file), view.library_version
    monkeypatch.setattr(view, "library_version", lambda name: "99.1" if name == library else installed(name))
    assert changed(before, keys(run_file)) == LIBRARIES[library]


def test_another_version_of_this_project_is_computed_anew(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(run_file)
    monkeypatch.setattr(view, "__version__", "99.1")
    assert changed(before, keys(run_file)) == ALL


def test_every_numeric_library_that_a_stage_imports_is_in_its_key() -> None:
    for spec in stage_specs():
        found = {name.split(".")[0] for path in (REPOSITORY / "stages" / spec.name).rglob("*.py") for name in imported(path)}
        assert found & {"numpy", "scipy", "tokenizers", "torch", "transformers"} <= set(spec.libraries), spec.name


def test_a_version_is_read_without_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    view.library_version.cache_clear()
    monkeypatch.setattr("pipeline.run.view.metadata.version", lambda name: "2.13.0+cu128")
    assert view.library_version("torch") == "2.13.0"
    view.library_version.cache_clear()


def test_a_new_target_leaves_everything_but_the_report(run_file: Path) -> None:
    before, after = keys(run_file), keys(run_file, "clustering.num_experts=[4, 3]")
    assert changed(before, after) == {"report"}
    assert {name for name in after if name not in before} == {name.replace("-3e-", "-4e-") for name in OF_TARGETS}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_another_config_or_side_file_is_another_model(run_file: Path, file: str) -> None:
    before, path = keys(run_file), run_file.parent / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), "remark": 1}))
    assert changed(before, keys(run_file)) == ALL


@pytest.mark.parametrize("position", [-1, 5000])
def test_other_weights_are_another_model(run_file: Path, position: int) -> None:
    before, path = keys(run_file), run_file.parent / "model" / "model-00002-of-00010.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert changed(before, keys(run_file)) == ALL


def test_other_text_is_another_calibration(run_file: Path) -> None:
    before = keys(run_file)
    save_token_ids(run_file.parent / "ids.npy", seed=1)
    assert changed(before, keys(run_file)) == {*AFTER_CALIBRATION, *EVALUATES, "prepare-evaluation"}


def test_where_a_model_lies_does_not_matter_to_what_is_computed(run_file: Path) -> None:
    before = keys(run_file)
    moved = (run_file.parent / "model").rename(run_file.parent / "elsewhere")
    after = keys(run_file, f"model={moved}")
    assert not changed(before, after) & {"prepare-model", "calibrate", "cluster", "merge-3e-tied", "evaluate-source"}


def test_texts_of_the_same_name_are_told_apart_and_their_order_counts(tmp_path: Path) -> None:
    """Files are read in the order given: the seeded draw depends on it."""
    for folder, text in (("a", "one"), ("b", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(text)
    a, b = str(tmp_path / "a" / "x.txt"), str(tmp_path / "b" / "x.txt")
    found = [key_of(files_identity(data, "calibration")) for data in ((a,), (b,), (a, b), (b, a))]
    assert len(set(found)) == 4


def test_a_missing_text_is_an_error_and_a_hub_name_is_known_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"calibration\.data: .*x\.txt does not exist; give a file, or a dataset of the hub"):
        files_identity((str(tmp_path / "x.txt"),), "calibration")
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "org/name-1.5:train", "org.v2/name.v1"):
        assert is_dataset_name([name])
    for name in ("texts/c4.jsonl", "texts/c4.JSON.gz", "name", "a/b/c", "/org/name", "org/name:a:b", "org/na*me"):
        assert not is_dataset_name([name])
    assert not is_dataset_name(["org/name", "org/other"])
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_dataset_name(["org/name"])


def test_a_key_does_not_depend_on_the_order_of_settings() -> None:
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of({"a": 1}) != key_of({"a": "1"})


def test_a_changed_key_is_explained_setting_by_setting() -> None:
    old = {"version": 1, "settings": {"linkage": "average", "distance": "euclidean"}, "gone": 1}
    new = {"version": 2, "settings": {"linkage": "single", "distance": "euclidean"}, "new": {"deep": True}}
    assert list(differences(old, new)) == [
        "gone: 1 -> None",
        "new: None -> {'deep': True}",
        "settings.linkage: average -> single",
        "version: 1 -> 2",
    ]


def test_the_identity_of_every_stage_is_kept_in_its_folder(run_file: Path) -> None:
    done = FinishedRun.of(run_file)
    for stage in done.view.all_parts():
        kept = json.loads((done.run_dir / stage.dir / "identity.json").read_text())
        assert key_of(kept) == stage.key
        assert stage.dir.endswith(stage.key)


def test_a_report_names_the_versions_that_computed_its_numbers_and_no_setting_that_its_key_leaves_out(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a later run, with another version installed, computes only a part anew."""
    done = FinishedRun.of(run_file)
    report = json.loads((done.run_dir / "report.json").read_text())
    assert report["versions"].keys() == ALL
    assert report["versions"]["calibrate"] == {
        "hcsmoe": __version__, **{name: view.library_version(name) for name in ("numpy", "torch", "transformers")}
    }  # fmt: skip
    assert "resources" not in report["settings"]
    was = report["versions"]["cluster"]["scipy"]
    installed = view.library_version
    monkeypatch.setattr(view, "library_version", lambda name: "99.1" if name == "scipy" else installed(name))
    shown = [line for line in describe_status(done.run_dir) if isinstance(line, str)]
    (line,) = [line for line in shown if line.startswith("cluster is not reused")]
    assert line == f"cluster is not reused from {done.part('cluster').dir}: libraries.scipy: {was} -> 99.1"
    again = FinishedRun.of(run_file, ["resources.max_attempts=5"])
    assert again.recorder.stages == {"cluster", "merge", "assemble", "evaluate", "report"}
    after = json.loads((again.run_dir / "report.json").read_text())["versions"]
    assert after["cluster"]["scipy"] == "99.1"
    assert after["calibrate"] == report["versions"]["calibrate"]
