"""Additions: a stage and a collector, each one short file in `tests/toys`, through the real pipeline."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands.plan import describe_plan
from pipeline.commands.status import describe_status
from pipeline.config import load_config
from stages.calibrate import spec as calibrate
from stages.calibrate.collectors import registry
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.evidence import read_evidence
from stages.registry import added_stage
from tests.runs import FinishedRun, write_run_file
from tests.toys import headcount
from tests.toys.loudest import Loudest


def test_a_stage_of_ones_own_runs_beside_another_and_publishes(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path
) -> None:
    with added_stage(headcount.SPEC):
        settings = {"headcount.unit": "arrays", "evaluation": None}
        run_file = write_run_file(tmp_path, tiny_checkpoint("mixtral"), token_ids, settings)
        done = FinishedRun.of(run_file)
        counted = json.loads((done.run_dir / headcount.FILE).read_text())
        assert counted == {"arrays": len(Checkpoint(done.model(done.view.targets[0].part)).tensors)}
        events = [json.loads(line) for line in (done.run_dir / "events.jsonl").read_text().splitlines()]
        begins = next(n for n, one in enumerate(events) if one.get("stage") == "headcount")
        sealed = [n for n, one in enumerate(events) if one["event"] == "sealed" and one["unit"].startswith("assemble-")]
        assert begins < sealed[0], "its units are listed while assemble still runs"
        counts = [n for n, one in enumerate(events) if one["event"] == "sealed" and one["unit"].startswith("headcount-")]
        assert len(counts) == len(sealed) == 2
        assert min(counts) > min(sealed)
        assert FinishedRun.of(run_file).recorder.units == []
        assert FinishedRun.of(run_file, ["headcount.unit=things"]).recorder.stages == {"headcount", "report"}
        assert any("headcount" in str(cell) for item in describe_plan(load_config(run_file, [])) for cell in _cells(item))
        assert any("headcount" in str(cell) for item in describe_status(done.run_dir) for cell in _cells(item))
    with pytest.raises(InputError, match="headcount is not a setting"):
        load_config(run_file, [])


def _cells(item: object) -> list[object]:
    columns = getattr(item, "columns", [])
    return [cell for column in columns for cell in column.cells]


def test_a_collector_of_ones_own_is_gathered_where_it_is_required(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = finished_run("qwen2_moe")
    layer = done.view.survey.moe_layers[-1]
    settings = {"evaluation": None, "clustering.num_experts": [3]}
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings)
    with monkeypatch.context() as patch:
        patch.setitem(registry.FURTHER, "loudest", Loudest())
        patch.setattr(calibrate, "required_collectors", lambda run: registry.gathering(["largest_norm"]))
        other = FinishedRun.of(run_file)
        evidence = read_evidence(other.calibrate_dir, layer, collectors=["loudest"])
    assert other.part("calibrate").key != done.part("calibrate").key
    largest_E, used_E = evidence["largest_norm"], evidence["num_routed_tokens"]
    mean_E = evidence["gated_output_norm_sum"] / np.maximum(used_E, 1)
    assert (largest_E >= mean_E).all() and (largest_E[used_E > 0] > 0).all()
    plain = read_evidence(done.calibrate_dir, layer)
    assert all(np.array_equal(plain[name], evidence[name]) for name in plain.columns), "the others keep their values"
    with pytest.raises(InputError, match=r"the evidence has no column largest_norm"):
        plain["largest_norm"]


VARIANTS = "variants=[hc-smoe, {name: ward, preset: hc-smoe, clustering: {linkage: ward}, export: {formats: [tied]}}]"


def test_variants_share_one_calibration_and_carry_their_names(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun]
) -> None:
    done = finished_run("mixtral")
    settings = {"clustering.num_experts": [3], "evaluation": None}
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings)
    other = FinishedRun.of(run_file, [VARIANTS])
    assert other.part("calibrate").key == done.part("calibrate").key
    name = other.config.name
    names = [f"{name}-hc-smoe-3e-tied", f"{name}-hc-smoe-3e-stock", f"{name}-ward-3e-tied"]
    assert sorted(path.name for path in (other.run_dir / "models").iterdir()) == sorted(names)
    assert [(one["name"], one.get("variant")) for one in other.report["models"][1:]] == [
        (names[0], "hc-smoe"), (names[1], "hc-smoe"), (names[2], "ward"),
    ]  # fmt: skip
    weights = {path.name: path.read_bytes() for path in other.model("hc-smoe-3e-tied").glob("*.safetensors")}
    assert weights == {path.name: path.read_bytes() for path in done.model("3e-tied").glob("*.safetensors")}
    assert "ward-3e-tied" in (other.run_dir / "events.jsonl").read_text()
    alone = FinishedRun.of(run_file, ["clustering.linkage=ward", "export.formats=[tied]"])
    theirs = {path.name: path.read_bytes() for path in alone.model("3e-tied").glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in other.model("ward-3e-tied").glob("*.safetensors")} == theirs


@pytest.mark.parametrize(
    ("setting", "message"),
    {
        "variants=[reap]": "variants: reap: there is no preset named reap; known presets: hc-smoe",
        "variants=[hc-smoe, hc-smoe]": "variants: 2 are named hc-smoe; give each its own name",
        "variants=[{name: a, refit: {}}]": "variants.0.refit is not a setting",
        "variants=[{name: a, clustering: {linkage: far}}]": "variants: a: clustering.linkage: Input should be 'average'",
        "variants=[{name: a, clustering: {num_experts: 4}}]": "variants: a: clustering.num_experts holds for all variants",
        "variants=[{name: a-4e}]": "variants.0.name: use at most 48 letters, digits",
        "variants=[]": "variants is an empty list",
    }.items(),
)
def test_a_mistake_in_variants_is_one_line(tmp_path: Path, setting: str, message: str) -> None:
    run_file = write_run_file(tmp_path, tmp_path / "model", tmp_path / "ids.npy", {})
    with pytest.raises(InputError) as refused:
        load_config(run_file, [setting])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_settings_of_a_method_beside_variants_are_refused(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, tmp_path / "model", tmp_path / "ids.npy", {})
    for setting in ("clustering.linkage=ward", "merging.method=average"):
        with pytest.raises(InputError, match="is set beside variants, which have their own; move it into a variant"):
            load_config(run_file, ["variants=[hc-smoe]", setting])
