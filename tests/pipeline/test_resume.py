"""A run is resumed from files: what is sealed is not run again, what is lost is made again, and the bytes stay the same."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.driver.worker import Worker
from pipeline.executors.base import Slot
from pipeline.executors.local import LocalExecutor
from pipeline.state.lock import RunLock
from pipeline.state.logs import file_name
from stages.contracts.errors import InputError
from stages.contracts.units import Unit
from tests.runs import FinishedRun, digests, execute, write_run_file
from tests.tiny import save_checkpoint

Runs = Callable[[str], FinishedRun]


@pytest.fixture
def copy(tmp_path: Path, finished_run: Runs) -> FinishedRun:
    """A finished run that a test may change."""
    done = finished_run("mixtral")
    shutil.copytree(done.run_dir, tmp_path / "run", symlinks=True)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(done.run_file.read_text().replace(str(done.run_dir), str(tmp_path / "run")))
    assert str(tmp_path) in run_file.read_text()
    return FinishedRun.of(run_file)


def test_a_second_run_executes_nothing_and_changes_nothing(copy: FinishedRun) -> None:
    assert copy.recorder.stages == {"report"}, "the run directory itself is a setting of the report"
    before = {path: path.stat().st_mtime_ns for path in copy.run_dir.rglob("*") if path.is_file()}
    for verify in (False, True):
        result, recorder = execute(copy.config, verify=verify)
        assert (result.num_run, recorder.units) == (0, [])
        assert result.num_reused > 20
        assert result.report == copy.report
    after = {path: path.stat().st_mtime_ns for path in copy.run_dir.rglob("*") if path.is_file()}
    assert {path for path in before if before[path] != after[path]} <= {
        copy.run_dir / name for name in ("report.json", "report.html", "run.json", "events.jsonl", f"logs/{file_name()}")
    }
    assert set(after) == set(before)


@pytest.mark.parametrize(
    ("settings", "ran"),
    [
        (["clustering.num_experts=[4]"], {"cluster", "merge", "assemble", "evaluate", "report"}),
        (["clustering.linkage=single"], {"cluster", "merge", "assemble", "evaluate", "report"}),
        (["merging.method=average"], {"cluster", "merge", "assemble", "evaluate", "report"}),
        (["export.router=dominant", "export.formats=[stock]"], {"cluster", "merge", "assemble", "evaluate", "report"}),
        (["resources.layers_per_shard=1"], set()),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_what_a_change_does_not_touch_is_not_run_again(copy: FinishedRun, settings: list[str], ran: set[str]) -> None:
    other = FinishedRun.of(copy.run_file, settings)
    assert other.recorder.stages == ran
    assert not [unit for unit in other.recorder.units if unit.stage == "evaluate" and "source" in unit.part_dir]


def test_an_old_result_stays_when_a_setting_changes_and_the_name_moves_on(copy: FinishedRun) -> None:
    before = digests(copy.model("3e-stock"))
    other = FinishedRun.of(copy.run_file, ["merging.method=average"])
    link = copy.run_dir / "models" / "tiny-mixtral-3e-stock"
    assert link.resolve() == other.model("3e-stock").resolve()
    assert digests(copy.model("3e-stock")) == before != digests(other.model("3e-stock"))


def test_no_transient_file_is_left(finished_run: Runs) -> None:
    done = finished_run("mixtral")
    left = [path for path in done.run_dir.rglob("*") if path.is_file() and {"hidden", "partial"} & set(path.parts)]
    temporary = list(done.run_dir.rglob(".tmp-*"))
    assert left == temporary == []
    assert not (done.run_dir / "driver.lock").exists()


class Watching(LocalExecutor):
    """Looks, before each unit, at which layers there are hidden states and of which token shards."""

    seen: list[dict[str, list[str]]]

    def submit(self, slot: Slot, unit: Unit) -> None:
        found: dict[str, list[str]] = {}
        for path in (Path(unit.run_dir) / unit.part_dir / "hidden").glob("*/*"):
            found.setdefault(path.parent.name, []).append(path.stem)
        type(self).seen.append(found)
        super().submit(slot, unit)


def test_hidden_states_of_two_boundaries_at_most_are_on_disk(tmp_path: Path, finished_run: Runs) -> None:
    done = finished_run("mixtral")
    settings = {"resources.layers_per_shard": 1, "calibration.tokens_per_shard": 64, "evaluation.tokens_per_shard": 64}
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings)
    watching = type("Once", (Watching,), {"seen": []})
    execute(load_config(run_file, []), watching)
    assert max(len(found) for found in watching.seen) == 2, "what the layer shard reads and what it writes"
    for found in watching.seen:
        shards = [shard for names in found.values() for shard in names]
        assert len(shards) == len(set(shards)), "what a sealed unit has read is deleted before the next one starts"


@pytest.mark.parametrize("layers_per_shard", [2, 3])
def test_the_size_of_layer_shards_does_not_change_a_byte(tmp_path: Path, finished_run: Runs, layers_per_shard: int) -> None:
    done = finished_run("mixtral")
    settings = {"clustering.num_experts": [6, 3], "resources.layers_per_shard": layers_per_shard}
    other = FinishedRun.of(write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings))
    held = {unit.hold.key for unit in other.recorder.units if unit.stage == "calibrate" and unit.hold}
    assert len(held) == -(-3 // layers_per_shard)
    assert len({unit.hold.key for unit in done.recorder.units if unit.stage == "calibrate" and unit.hold}) == 3
    assert other.results() == done.results()
    assert [model.get("loss") for model in other.report["models"]] == [model.get("loss") for model in done.report["models"]]


class Interrupted(LocalExecutor):
    """Ends the driver, as Ctrl-C does, before the unit that `stop` names is run."""

    stop: Callable[[Unit], bool]

    def submit(self, slot: Slot, unit: Unit) -> None:
        if type(self).stop(unit):
            raise KeyboardInterrupt
        super().submit(slot, unit)


def interrupting(stop: Callable[[Unit], bool]) -> Callable[[Path], LocalExecutor]:
    return type("Once", (Interrupted,), {"stop": staticmethod(stop)})


STOPS: dict[str, Callable[[Unit], bool]] = {
    "before the second layer shard": lambda unit: unit.stage == "calibrate" and unit.name.startswith("layers-0001"),
    "inside the second layer shard": lambda unit: unit.stage == "calibrate" and unit.name == "layers-0001-0002/tokens-0001",
    "before a layer is summed": lambda unit: unit.stage == "calibrate" and unit.name == "layer-0001",
    "after calibrate": lambda unit: unit.stage == "cluster",
    "inside merge": lambda unit: unit.stage == "merge" and "-00003-" in unit.name,
    "before a load check": lambda unit: unit.stage == "assemble",
    "before a score": lambda unit: unit.stage == "evaluate" and unit.name == "perplexity",
}


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_is_continued_to_the_same_bytes(tmp_path: Path, finished_run: Runs, stop: str) -> None:
    """Continued twice from the same place: as it was left, and after its transient files were lost."""
    done = finished_run("mixtral")
    settings = {"clustering.num_experts": [6, 3], "resources.layers_per_shard": 1}
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings)
    with pytest.raises(KeyboardInterrupt):
        execute(load_config(run_file, []), interrupting(STOPS[stop]))
    run_dir = tmp_path / "run"
    sealed = set(run_dir.glob("*/manifests/**/*.json"))
    assert sealed
    assert not (run_dir / "report.json").exists()
    shutil.copytree(run_dir, tmp_path / "as it was left", symlinks=True)
    assert continued(run_file, run_dir, done) & sealed == set()
    shutil.rmtree(run_dir)
    (tmp_path / "as it was left").rename(run_dir)
    for folder in ("hidden", "partial"):
        for path in run_dir.glob(f"*/{folder}"):
            shutil.rmtree(path)
    again = continued(run_file, run_dir, done) & sealed
    assert all("layers-" in path.parent.name for path in again), "only what transient files are lost for runs again"


def continued(run_file: Path, run_dir: Path, done: FinishedRun) -> set[Path]:
    """Continue a run to the results of another one; manifests of the units that ran."""
    other = FinishedRun.of(run_file)
    assert other.results() == done.results()
    left = [path for path in run_dir.rglob("*") if path.is_file() and {"hidden", "partial"} & set(path.parts)]
    assert execute(other.config)[0].num_run == 0
    assert not [path for path in left if path.exists()]
    return {run_dir / unit.part_dir / "manifests" / f"{unit.name}.json" for unit in other.recorder.units}


def test_a_worker_killed_between_writing_and_sealing_loses_nothing(
    tmp_path: Path, finished_run: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = finished_run("mixtral")
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), {"clustering.num_experts": [6, 3]})
    num_seals = 0

    def die_once(unit: Unit, *rest: object) -> object:
        nonlocal num_seals
        num_seals += unit.stage == "merge"
        if num_seals == 3:
            raise KeyboardInterrupt
        return seal(unit, *rest)

    seal = Worker.run.__globals__["seal"]
    monkeypatch.setattr("pipeline.driver.worker.seal", die_once)
    with pytest.raises(KeyboardInterrupt):
        execute(load_config(run_file, []))
    monkeypatch.undo()
    assert FinishedRun.of(run_file).results() == done.results()


def test_a_lost_or_shortened_file_is_made_again_and_a_changed_one_under_verify(copy: FinishedRun) -> None:
    before = copy.results()
    for change in ("delete", "shorten", "flip"):
        path = next(
            path for path in sorted((copy.run_dir / copy.part("merge", copy.view.targets[0].part).dir / "checkpoint").iterdir())
        )
        content = path.read_bytes()
        path.unlink()  # the published checkpoint may share these bytes by a hard link
        if change == "shorten":
            path.write_bytes(content[:-1])
        if change == "flip":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert execute(copy.config)[0].num_run == 0
        _, recorder = execute(copy.config, verify=True)
        assert [unit.name for unit in recorder.units] == [path.name], change
        assert path.read_bytes() == content
    assert copy.results() == before


def test_a_run_directory_in_use_is_refused_with_its_holder(copy: FinishedRun) -> None:
    with RunLock(copy.run_dir):
        holder = json.loads((copy.run_dir / "driver.lock").read_text())
        assert holder["pid"] == os.getpid()
        with pytest.raises(InputError, match=rf"in use by another driver: host .*, pid {os.getpid()}"):
            execute(copy.config)
    assert execute(copy.config)[0].num_run == 0


def test_a_model_of_which_only_the_weights_differ_shares_nothing(tmp_path: Path, copy: FinishedRun) -> None:
    other_model = save_checkpoint(tmp_path / "tiny-mixtral", "mixtral", seed=1)
    other = FinishedRun.of(copy.run_file, [f"model={other_model}"])
    assert other.recorder.stages == {"prepare", "calibrate", "cluster", "merge", "assemble", "evaluate", "report"}
    assert not {one.dir for one in other.view.all_parts()} & {one.dir for one in copy.view.all_parts()}
