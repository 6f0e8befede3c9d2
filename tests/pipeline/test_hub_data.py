"""Datasets of the hub, from a stand-in server on this machine: one commit, stated, fetched once and read from files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline import hub_data
from pipeline.hub_data import Dataset, choose_files
from pipeline.hub_data import _chosen as chosen
from stages.contracts.errors import InputError
from tests.pipeline.hub_server import COMMIT, Hub, serve
from tests.pipeline.test_hub import hcsmoe
from tests.runs import read_config
from tests.stages.texts import EXAMPLE, json_line

OTHER_COMMIT = COMMIT[::-1]
CONFIGS = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: "data/*.jsonl"}
  - {split: held, path: held.jsonl}
---
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two files of a split train, one of them with a name that looks like a pattern, and one of a split held."""
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(CONFIGS)
    for name, word in (("data/a[1].jsonl", "house"), ("data/b.jsonl", "house"), ("held.jsonl", "water")):
        (folder / name).write_text(json_line(word, file=name) * 20)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The example, which has a tokenizer."""
    folder = Path(shutil.copytree(EXAMPLE, tmp_path / "model"))
    assert read_config(folder)["model_type"] == "mixtral"
    return folder


def run_file(folder: Path, model: Path, **changes: Any) -> Path:
    text = {"data": "org/words", "num_sequences": 2, "sequence_length": 8, **changes}
    settings = {
        "model": str(model), "run_dir": str(folder / "run"), "calibration": text, "clustering": {"num_experts": 4},
        "export": {"formats": "stock"},
    }  # fmt: skip
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


def calibration_dirs(folder: Path) -> set[str]:
    return {path.name for path in (folder / "run").glob("prepare-calibration-*")}


def test_a_run_reads_one_commit_states_it_and_another_commit_is_another_text(
    dataset: Path, model: Path, tmp_path: Path
) -> None:
    path = run_file(tmp_path, model)
    run = ("run", str(path), "--executor", "local")
    with serve(Hub({}, datasets={"org/words": dataset})) as hub:
        plan = hcsmoe(hub, tmp_path, "plan", str(path))
        assert plan.returncode == 0, plan.stderr
        said = " ".join(plan.stdout.split())
        num_bytes = sum(file.stat().st_size for file in (dataset / "data").iterdir())
        assert f"calibration.data org/words at commit {COMMIT}: 2 of 2 files, {num_bytes / 1000:.1f} kB" in said, said
        assert not (tmp_path / "run").exists() and set(hub.downloads()) <= {"README.md"}
        first = hcsmoe(hub, tmp_path, *run)
        assert first.returncode == 0, first.stderr
        assert sorted(name for name in hub.downloads() if name.endswith("jsonl")) == ["data/a[1].jsonl", "data/b.jsonl"]
        card = (tmp_path / "run" / "models" / "model-4e-stock" / "README.md").read_text()
        assert f"2 sequences of 8 tokens of org/words (revision {COMMIT})" in card
        (before,) = calibration_dirs(tmp_path)
        identity = json.loads((tmp_path / "run" / before / "identity.json").read_text())["settings"]["data"]
        assert identity == {"org/words": {"commit": COMMIT, "files": ["data/a[1].jsonl", "data/b.jsonl"]}}
        by_commit = hcsmoe(hub, tmp_path, *run, "--set", f"calibration.revision={COMMIT}")
        assert by_commit.returncode == 0 and calibration_dirs(tmp_path) == {before}, by_commit.stderr
        assert not any(call.startswith("stages.prepare") for call in by_commit.stdout.splitlines())
    offline = hcsmoe(hub, tmp_path, *run)
    assert offline.returncode == 0 and calibration_dirs(tmp_path) == {before}, offline.stderr
    assert f"calibration.data: org/words: the hub cannot be reached; files of commit {COMMIT} in" in " ".join(
        offline.stderr.split()
    )
    (dataset / "data" / "b.jsonl").write_text(json_line("river") * 20)
    with serve(Hub({}, datasets={"org/words": dataset})) as hub:
        hub.commit = OTHER_COMMIT
        moved = hcsmoe(hub, tmp_path, *run)
        assert moved.returncode == 0 and len(calibration_dirs(tmp_path)) == 2, moved.stderr


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "org/none"}, "calibration.data: org/none is no file, and cannot be read from the hub: "),
        ({"revision": "v9"}, "calibration.data: org/words (revision v9) is no file, and cannot be read from the hub: "),
        ({"data": "org/words:test"}, "calibration.data: org/words has no split 'test'; it has train, held\n"),
        ({"data": "org/tables"}, "calibration.data: org/tables: its file train.csv is of a kind that is not read; known: .txt"),
        ({"data": "org/empty"}, "calibration.data: org/empty: no data files are found: "),
    ],
)
def test_one_clear_error_before_anything_is_written(
    changes: dict[str, str], says: str, dataset: Path, model: Path, tmp_path: Path
) -> None:
    folders = {"org/words": dataset, "org/tables": tmp_path / "tables", "org/empty": tmp_path / "empty"}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    (tmp_path / "tables" / "train.csv").write_text("a,b\n1,2\n")
    with serve(Hub({}, datasets=folders)) as hub:
        failed = hcsmoe(hub, tmp_path, "run", str(run_file(tmp_path, model, **changes)), "--executor", "local")
    assert failed.returncode == 2 and failed.stderr.startswith(f"error: {says}"), failed.stderr
    assert failed.stderr.count("\n") == 1
    assert not list((tmp_path / "run").glob("prepare-*"))


def test_a_hub_that_is_away_and_nothing_in_the_cache_is_one_line(model: Path, tmp_path: Path) -> None:
    with serve(Hub({})) as hub:
        pass
    away = hcsmoe(hub, tmp_path, "run", str(run_file(tmp_path, model)), "--executor", "local")
    assert away.returncode == 2 and away.stderr.count("\n") == 1, away.stderr
    assert (
        f"error: calibration.data: org/words is no file, is not in {tmp_path}/run/source, and the hub cannot be" in away.stderr
    )


def test_of_a_large_dataset_files_are_taken_in_a_seeded_order_until_they_are_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_data, "ENOUGH_BYTES", 25)
    sizes = {f"train-{number}.parquet": 10 for number in range(9)}

    def take(seed: int) -> Dataset:
        return chosen("org/large", "train", COMMIT, sizes, tmp_path, seed, "here")

    found = [take(seed) for seed in range(8)]
    assert all(len(one.sizes) == 3 and one.num_files == 9 for one in found)
    assert found == [take(seed) for seed in range(8)]
    assert len({tuple(one.sizes) for one in found}) > 4
    again = chosen("org/large", "train", COMMIT, found[0].sizes, tmp_path, 0, "here")
    assert again.sizes == found[0].sizes, "what was fetched before is what is chosen from it"


def test_a_dataset_whose_file_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"here: it has a file named '\.\./train\.jsonl', which leads out of its folder"):
        chosen("org/evil", "train", COMMIT, {"../train.jsonl": 1}, tmp_path, 0, "here")


def test_offline_is_said_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^calibration\.data: org/words is no file, is not in .*, and the hub cannot be reached"
    ):
        choose_files("org/words", None, 0, tmp_path, "calibration")
