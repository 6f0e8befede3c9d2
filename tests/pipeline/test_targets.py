"""What a finished run leaves for each family: checkpoints that are the source's where nothing was merged, and the merged
model that an independent merge in memory gives where something was.

Dimensions: S sequences, T tokens, E experts, K clusters.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.checks import check
from pipeline.config import read_config
from pipeline.run.view import RunView
from stages.contracts.dendrogram import read_labels
from stages.contracts.errors import InputError
from stages.contracts.evidence import read_evidence
from stages.contracts.paths import labels_file
from stages.contracts.settings import RunConfig
from stages.contracts.targets import with_counts
from tests.runs import FinishedRun, digests
from tests.tiny import FAMILIES, load, logits, random_ids

IDS_ST = random_ids(num_sequences=4, seed=7)
Runs = Callable[[str], FinishedRun]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def done(family: str, finished_run: Runs) -> FinishedRun:
    return finished_run(family)


def load_values(changes: Mapping[str, Any]) -> RunConfig:
    """A run file in memory."""
    base = {"model": "m", "run_dir": "runs/never", "calibration": {"data": "a.txt"}, "clustering": {"num_experts": [4]}}
    return read_config({**base, **changes})


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def clusters(done: FinishedRun, layer: int, num_clusters: int) -> list[list[int]]:
    labels_E = read_labels(labels_file(done.cluster_dir, layer), num_clusters)
    return [np.flatnonzero(labels_E == label).tolist() for label in range(num_clusters)]


def usage(done: FinishedRun, layer: int) -> np.ndarray:
    return read_evidence(done.calibrate_dir, layer)["num_routed_tokens"]


def merged_in_memory(done: FinishedRun, num_experts: Mapping[int, int]) -> PreTrainedModel:
    """The source with every expert replaced by its cluster's usage-weighted mean, in float64 on transformers' own modules."""
    model = load(done.source)
    for layer, num_clusters in num_experts.items():
        used_E = usage(done, layer)
        experts = model.model.layers[layer].mlp.experts
        for members in clusters(done, layer, num_clusters):
            total = used_E[members].sum()
            for weight in (experts.gate_up_proj, experts.down_proj):
                mean = sum(weight[member].double() * (int(used_E[member]) / int(total)) for member in members)
                weight[members] = mean.float()
    return model


def test_stock_with_all_experts_is_the_source_byte_for_byte(done: FinishedRun, family: str) -> None:
    target = done.model(f"{FAMILIES[family].num_experts}e-stock")
    files = digests(target)
    del files["README.md"]
    assert files == digests(done.source)


def test_tied_with_all_experts_has_the_sources_tensors_and_gives_its_logits_exactly(done: FinishedRun, family: str) -> None:
    num_experts = FAMILIES[family].num_experts
    target = done.model(f"{num_experts}e-tied")
    found, source = tensors(target), tensors(done.source)
    maps = {name: found.pop(name) for name in list(found) if name.endswith("expert_map")}
    assert len(maps) == len(FAMILIES[family].moe_layers)
    assert all(one.tolist() == list(range(num_experts)) for one in maps.values())
    assert {name: raw(tensor) for name, tensor in found.items()} == {name: raw(tensor) for name, tensor in source.items()}
    assert torch.equal(logits(load(target, trust_remote_code=True), IDS_ST), logits(load(done.source), IDS_ST))


def test_tied_logits_are_those_of_a_model_merged_in_memory(done: FinishedRun, family: str) -> None:
    half = FAMILIES[family].num_experts // 2
    in_memory = logits(merged_in_memory(done, dict.fromkeys(FAMILIES[family].moe_layers, half)), IDS_ST)
    torch.testing.assert_close(
        logits(load(done.model(f"{half}e-tied"), trust_remote_code=True), IDS_ST), in_memory, rtol=1e-5, atol=2e-5
    )
    assert not torch.allclose(in_memory, logits(load(done.source), IDS_ST), atol=1e-2), "merging changes nothing here"


def test_tied_keeps_a_different_number_of_experts_in_each_layer(done: FinishedRun, family: str) -> None:
    layers = FAMILIES[family].moe_layers
    counts = dict(zip(layers, (5, 2, 3), strict=False))
    lists = f"clustering.num_experts=[{list(counts.values())}]"
    other = FinishedRun.of(done.run_file, [lists, "export.formats=[tied]"])
    (target,) = other.view.targets
    model = load(other.run_dir / "models" / target.name, trust_remote_code=True)
    found = {layer: model.model.layers[layer].mlp.experts.down_proj.shape[0] for layer in layers}
    assert found == counts
    in_memory = logits(merged_in_memory(done, counts), IDS_ST)
    torch.testing.assert_close(logits(model, IDS_ST), in_memory, rtol=1e-5, atol=2e-5)
    assert other.recorder.stages == {"cluster", "merge", "assemble", "evaluate", "report"}


@pytest.mark.parametrize("part", ["all", "half"])
@pytest.mark.parametrize("export_format", ["stock", "tied"])
def test_a_target_loads_with_nothing_missing_unexpected_or_of_another_size(
    done: FinishedRun, family: str, part: str, export_format: str
) -> None:
    num_experts = FAMILIES[family].num_experts // (1 if part == "all" else 2)
    options = {"trust_remote_code": True} if export_format == "tied" else {}
    _, info = AutoModelForCausalLM.from_pretrained(
        done.model(f"{num_experts}e-{export_format}"), output_loading_info=True, **options
    )
    assert {kind: list(names) for kind, names in info.items() if names} == {}


def test_stock_is_the_sources_class_with_fewer_experts(done: FinishedRun, family: str) -> None:
    half = FAMILIES[family].num_experts // 2
    source, target = load(done.source), load(done.model(f"{half}e-stock"))
    assert type(target) is type(source)
    for layer in FAMILIES[family].moe_layers:
        block = target.model.layers[layer].mlp
        assert block.experts.down_proj.shape[0] == half
        assert block.gate.weight.shape[0] == half
    assert not list(done.model(f"{half}e-stock").glob("*.py"))


def test_stock_router_rows_are_usage_weighted_means(done: FinishedRun, family: str) -> None:
    half = FAMILIES[family].num_experts // 2
    source, target = load(done.source), load(done.model(f"{half}e-stock"))
    for layer in FAMILIES[family].moe_layers:
        rows_ED = source.model.layers[layer].mlp.gate.weight.double().numpy()
        weights = usage(done, layer)
        means = [np.average(rows_ED[members], axis=0, weights=weights[members]) for members in clusters(done, layer, half)]
        np.testing.assert_allclose(target.model.layers[layer].mlp.gate.weight.numpy(), means, rtol=1e-5, atol=1e-7)


def test_clusters_of_one_keep_the_source_experts_bytes(done: FinishedRun, family: str) -> None:
    half = FAMILIES[family].num_experts // 2
    source, num_alone = load(done.source), 0
    for export_format in ("tied", "stock"):
        target = load(done.model(f"{half}e-{export_format}"), trust_remote_code=export_format == "tied")
        for layer in FAMILIES[family].moe_layers:
            for label, members in enumerate(clusters(done, layer, half)):
                if len(members) == 1:
                    num_alone += 1
                    for name in ("gate_up_proj", "down_proj"):
                        ours = getattr(target.model.layers[layer].mlp.experts, name)[label]
                        assert raw(ours) == raw(getattr(source.model.layers[layer].mlp.experts, name)[members[0]])
    assert num_alone


def test_what_is_not_an_expert_keeps_its_bytes(done: FinishedRun, family: str) -> None:
    half = FAMILIES[family].num_experts // 2
    source = tensors(done.source)
    for export_format in ("tied", "stock"):
        target = tensors(done.model(f"{half}e-{export_format}"))
        kept = [name for name in source if ".experts." not in name and (export_format == "tied" or ".gate.weight" not in name)]
        assert len(kept) > 10
        assert {name: raw(target[name]) for name in kept} == {name: raw(source[name]) for name in kept}
    assert (done.model(f"{half}e-stock") / "generation_config.json").read_bytes() == (
        done.source / "generation_config.json"
    ).read_bytes()


def test_tied_generates_and_survives_a_round_trip_with_equal_bits(done: FinishedRun, family: str, tmp_path: Path) -> None:
    half = FAMILIES[family].num_experts // 2
    model = load(done.model(f"{half}e-tied"), trust_remote_code=True)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = torch.from_numpy(IDS_ST[:2, :5])
    text = model.generate(prompt, **settings)
    assert text.shape == (2, 13)
    greedy = prompt
    for _ in range(8):
        greedy = torch.cat([greedy, logits(model, greedy.numpy())[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(text, greedy)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, trust_remote_code=True)
    assert torch.equal(logits(again, IDS_ST), logits(model, IDS_ST))
    assert torch.equal(again.generate(prompt, **settings), text)


def test_tied_is_refused_without_trust_remote_code(done: FinishedRun, family: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        load(done.model(f"{FAMILIES[family].num_experts // 2}e-tied"), trust_remote_code=False)


def test_weight_files_of_a_target_are_whole_and_aligned(done: FinishedRun) -> None:
    for target in done.view.targets:
        for path in (done.run_dir / "models" / target.name).glob("*.safetensors"):
            header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
            assert header_bytes % 8 == 0
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
                assert list(file.keys())


@pytest.mark.parametrize(
    ("share", "num_experts", "kept"), [(0.5, 8, 4), (0.3, 8, 2), (0.3125, 8, 3), (0.4375, 8, 4), (0.01, 8, 1), (1, 5, 5)]
)
def test_a_share_is_the_nearest_number_of_experts(share: float, num_experts: int, kept: int) -> None:
    config = load_values({"clustering": {"targets": [{"share": share}, 6]}})
    assert with_counts(config, num_experts).clustering.num_experts == (kept, 6)
    assert config.clustering.model_dump()["num_experts"][0] == {"share": share}


def test_a_run_by_share_has_the_keys_of_the_run_by_number(tiny_checkpoint: Callable[[str], Path], token_ids: Path) -> None:
    """What is already made by number is reused, and the record of the run can be read by a status that knows no model."""

    def parts(targets: list[Any]) -> list[str]:
        text = {"data": str(token_ids), "num_sequences": 8, "sequence_length": 32}
        model = str(tiny_checkpoint("mixtral"))
        config = load_values({"model": model, "calibration": text, "clustering": {"targets": targets}})
        checked = check(config)
        return [part.key for part in RunView(checked.config, checked.inputs).all_parts()]

    half = FAMILIES["mixtral"].num_experts // 2
    assert parts([{"share": 0.5}]) == parts([half])
    with pytest.raises(InputError, match="two targets whose name would be"):
        parts([{"share": 0.5}, half])
