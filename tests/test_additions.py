"""Additions through the real pipeline: a stage, a collector, a method and a pruning rule, each a short file in `tests/toys`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.commands.plan import describe_plan
from pipeline.commands.status import describe_status
from pipeline.config import load_config
from pipeline.run.record import read_record
from stages.calibrate import spec as calibrate
from stages.calibrate.collectors import registry
from stages.checkpoint.folder import Checkpoint
from stages.cluster import registry as methods
from stages.contracts.errors import InputError
from stages.contracts.evidence import read_evidence
from stages.registry import added_stage
from tests.runs import FinishedRun, write_run_file
from tests.tiny import logits, random_ids
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


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


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
        evidence = read_evidence(other.calibrate_dir, layer, ["largest_norm"])
    assert other.part("calibrate").key != done.part("calibrate").key
    largest_E, used_E = evidence["largest_norm"], evidence["num_routed_tokens"]
    mean_E = evidence["gated_output_norm_sum"] / np.maximum(used_E, 1)
    assert (largest_E >= mean_E).all() and (largest_E[used_E > 0] > 0).all()
    plain = read_evidence(done.calibrate_dir, layer)
    assert all(np.array_equal(plain[name], evidence[name]) for name in plain.columns), "the others keep their values"
    with pytest.raises(InputError, match=r"the evidence has no column largest_norm"):
        plain["largest_norm"]


@pytest.fixture
def added_methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The toy methods, and the collector that one of them needs."""
    monkeypatch.setitem(registry.FURTHER, "loudest", Loudest())
    modules = ("tests.toys.nearest", "tests.toys.quietest")
    for module in modules:
        methods.register(module)
    yield
    for module in modules:
        methods.forget(module)


@pytest.mark.usefixtures("added_methods")
def test_a_method_and_a_pruning_rule_of_ones_own_share_a_run_with_hc_smoe(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun]
) -> None:
    done = finished_run("mixtral")
    settings = {"clustering.num_experts": [3]}
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings)
    other = FinishedRun.of(run_file, ["variants=[hc-smoe, quietest, {name: far, preset: nearest, clustering: {power: 1}}]"])
    name = other.config.name
    models = [f"{name}-far-3e-stock", f"{name}-far-3e-tied", f"{name}-hc-smoe-3e-stock", f"{name}-hc-smoe-3e-tied"]
    assert sorted(path.name for path in (other.run_dir / "models").iterdir()) == [*models, f"{name}-quietest-3e-stock"]
    source = weights(done.source)
    weights_of = {target: weights(other.model(target)) for target in ("quietest-3e-stock", "far-3e-tied")}
    for layer in other.view.survey.moe_layers:
        evidence = read_evidence(other.calibrate_dir, layer, ["largest_norm"])
        loudest = sorted(np.argsort(-evidence["largest_norm"])[:3].tolist())
        router = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        assert torch.equal(weights_of["quietest-3e-stock"][router], source[router][loudest])
        prefix = f"model.layers.{layer}.block_sparse_moe.experts"
        for slot, expert in enumerate(loudest):
            for matrix in ("w1", "w2", "w3"):
                kept = weights_of["quietest-3e-stock"][f"{prefix}.{slot}.{matrix}.weight"]
                assert torch.equal(kept, source[f"{prefix}.{expert}.{matrix}.weight"])
        slot_E = weights_of["far-3e-tied"][f"{prefix}.expert_map"]
        for slot in range(3):
            members = (slot_E == slot).nonzero().flatten().tolist()
            mean = torch.stack([source[f"{prefix}.{expert}.w2.weight"] for expert in members]).mean(0)
            torch.testing.assert_close(weights_of["far-3e-tied"][f"{prefix}.{slot}.w2.weight"], mean)
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(other.model("quietest-3e-stock")), random_ids())).all()
    pruned = next(one for one in other.report["models"] if one.get("variant") == "quietest")
    assert pruned["perplexity"] > 0


@pytest.mark.usefixtures("added_methods")
@pytest.mark.parametrize(
    ("setting", "message"),
    {
        "clustering.method=quietest": "export.formats lists tied, which cannot express what method quietest makes; set it to "
        "[stock]",
        "variants=[{name: a, preset: quietest, export: {formats: [tied]}}]": "variants: a: export.formats lists tied",
        "variants=[{name: a, preset: quietest, merging: {method: average}}]": "variants: a: merging is set, but method "
        "quietest does not read that section; leave it out",
        "variants=[{name: a, preset: nearest, clustering: {linkage: ward}}]": "variants: a: clustering.linkage is not a set",
        "clustering={num_experts: [3], method: nearest, linkage: ward}": "clustering.linkage is not a setting",
        "clustering.method=far": "clustering.method: there is no method named 'far'; known methods: adopt, ",
        "variants=[{name: a, preset: reap, refit: {mode: sequential, neurons: choose}}]": "variants: a: refit.neurons is "
        "choose, but method reap keeps single experts",
        "variants=[{name: a, preset: recombine, merging: {align: weight}}]": "variants: a: merging aligns neurons, but "
        "refit.neurons is choose: whole neurons are kept as they are; leave one of them out",
        "variants=[{name: a, preset: slim, budget: {kind: usage}, export: {formats: [tied]}}]": "variants: a: budget.kind is "
        "usage, but method slim keeps all experts of every layer; set budget.kind to uniform",
        "variants=[{name: a, preset: slim, refit: {neurons: keep}}]": "variants: a: method slim keeps some of its experts' "
        "neurons; set refit to {mode: sequential, neurons: choose}",
        "refit={neurons: choose}": "refit: neurons is set, but nothing is refitted; set mode to sequential, or leave it out",
        "variants=[{name: a, preset: hc-smoe, refit: {ridge: 0.1}}]": "variants: a: refit.ridge is set, but nothing",
        "clustering.method=[1]": "clustering.method: there is no method named [1]; known methods",
        "variants=[{name: a, clustering: {method: far}}]": "variants: a: clustering.method: there is no method named 'far'",
    }.items(),
)
def test_a_mistake_in_a_methods_settings_is_one_line(tmp_path: Path, setting: str, message: str) -> None:
    run_file = write_run_file(tmp_path, tmp_path / "model", tmp_path / "ids.npy", {})
    with pytest.raises(InputError) as refused:
        load_config(run_file, [setting])
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.usefixtures("added_methods")
def test_a_method_without_variants_is_a_setting_and_read_back(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun]
) -> None:
    done = finished_run("mixtral")
    settings = {"clustering.num_experts": [3], "clustering.method": "nearest", "export.formats": ["tied"], "evaluation": None}
    other = FinishedRun.of(write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings))
    clustering = read_record(other.run_dir).config.clustering
    assert clustering.model_dump(exclude_defaults=True) == {"num_experts": (3,)}
    assert (clustering.method, clustering.model_dump()["power"]) == ("nearest", 2.0)
    assert not [part for part in other.view.parts("cluster") if part.name == ""], "it has no dendrogram"


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
        "variants=[finest]": "variants: finest: there is no preset named finest; known presets: best, ",
        "variants=[hc-smoe, hc-smoe]": "variants: 2 are named hc-smoe; give each its own name",
        "variants=[{name: a, colour: {}}]": "variants.0.colour is not a setting",
        "variants=[{name: a, clustering: {linkage: far}}]": "variants: a: clustering.linkage: Input should be 'average'",
        "variants=[{name: a, clustering: {num_experts: 4}}]": "variants: a: clustering.num_experts holds for all variants",
        "variants=[{name: a-4e}]": "variants.0.name: is no name of a variant; use at most 48 letters, digits",
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
