"""Layers that predict further tokens, which transformers does not load, are dropped with their count, merged, or refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.contracts.errors import InputError
from stages.contracts.layer_plan import read_plan
from stages.contracts.paths import plan_file
from stages.model.survey import survey_checkpoint
from tests.quantised import checkpoint
from tests.runs import read_config, read_tensors, rewrite, run_all, tensor_bytes, token_ids
from tests.tiny import NUM_EXPERTS, build, load, logits, save


def with_mtp(family: str, folder: Path) -> Path:
    """A checkpoint with one more layer, as the hub's have: a copy of the last one, under the family's name for it."""
    source = save(build(family, torch.float32), folder / f"mtp-{family}")
    tensors, config = read_tensors(source), read_config(source)
    prefix, count = {
        "deepseek_v3": ("model.layers.3.", "num_nextn_predict_layers"),
        "glm4_moe": ("model.layers.3.", "num_nextn_predict_layers"),
        "qwen3_next": ("mtp.layers.0.", "mtp_num_hidden_layers"),
    }[family]
    last = {name: tensor for name, tensor in tensors.items() if "model.layers.2." in name}
    extra = {name.replace("model.layers.2.", prefix): tensor.clone() for name, tensor in last.items()}
    extra[f"{prefix}eh_proj.weight"] = torch.ones(32, 64)
    return rewrite(source, {**tensors, **extra}, {**config, count: 1})


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "qwen3_next"])
def test_dropped_with_their_count_unless_nothing_is_merged(family: str, tmp_path: Path) -> None:
    source = with_mtp(family, tmp_path)
    path, ids = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [NUM_EXPERTS, 4], ["stock", "tied"])
    assert tensor_bytes(exports[f"{NUM_EXPERTS}e-stock"]) == tensor_bytes(source)
    assert read_config(exports[f"{NUM_EXPERTS}e-stock"]) == read_config(source)
    for target in ("4e-stock", "4e-tied"):
        names, config = set(read_tensors(exports[target])), read_config(exports[target])
        assert not any("layers.3." in name or name.startswith("mtp.") for name in names)
        assert not config.get("num_nextn_predict_layers") and not config.get("mtp_num_hidden_layers")
        assert torch.isfinite(logits(load(exports[target], trust_remote_code=True), ids)).all()


PREFIXES = {"deepseek_v3": "model.layers.3.", "glm4_moe": "model.layers.3.", "qwen3_next": "mtp.layers.0."}


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("refit", [{}, {"mode": "sequential", "neurons": "choose"}])
def test_merged_like_the_last_layer(family: str, refit: dict[str, str], tmp_path: Path) -> None:
    source = with_mtp(family, tmp_path)
    path, ids = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [4], ["stock", "tied"], export={"mtp": "merge"}, refit=refit)
    found, given, prefix = read_tensors(exports["4e-stock"]), read_tensors(source), PREFIXES[family]
    ours = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    assert torch.equal(ours.pop("eh_proj.weight"), given[f"{prefix}eh_proj.weight"])
    # the layer is a copy of the last one: the same plan makes the same of it
    last = {name.removeprefix("model.layers.2."): tensor for name, tensor in found.items() if "model.layers.2." in name}
    assert set(ours) == set(last)
    routers = [name for name in ours if name.endswith(("mlp.gate.weight", "e_score_correction_bias"))]
    assert routers and all(len(ours[name]) == 4 for name in routers)
    for name, tensor in ours.items():
        if not refit or ".experts." not in name:
            assert torch.equal(tensor, last[name]), name
    if refit:  # neurons that were chosen for another layer, and values that were solved for it, say nothing about this one
        plan = read_plan(plan_file(next((tmp_path / "run").glob("recombine-*stock*")), 2))
        for number, slot in enumerate(plan.slots):
            experts = sorted({member.expert for member in slot.members})
            due = sum(given[f"{prefix}mlp.experts.{one}.down_proj.weight"] / len(experts) for one in experts)
            torch.testing.assert_close(ours[f"mlp.experts.{number}.down_proj.weight"], due)
    count = {"qwen3_next": "mtp_num_hidden_layers"}.get(family, "num_nextn_predict_layers")
    assert read_config(exports["4e-stock"])[count] == 1 and not read_config(exports["4e-tied"]).get(count)
    assert not any(name.startswith(prefix) for name in read_tensors(exports["4e-tied"]))
    assert torch.isfinite(logits(load(exports["4e-stock"]), ids)).all()


def test_packed_layers_are_merged_and_packed_alike(tmp_path: Path) -> None:
    packed, _ = checkpoint("int4", tmp_path)
    tensors = read_tensors(packed)
    more = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in tensors.items() if "layers.2." in name}
    rewrite(packed, {**tensors, **more}, {**read_config(packed), "num_nextn_predict_layers": 1})
    path, _ = token_ids(tmp_path)
    exports = run_all(packed, tmp_path / "run", path, [4], ["stock"], export={"mtp": "merge"})
    found = read_tensors(exports["4e-stock"])
    ours = {name: tensor for name, tensor in found.items() if "layers.3." in name}
    assert sum(".experts." in name for name in ours) == 4 * 3 * 3
    assert all(torch.equal(tensor, found[name.replace("layers.3.", "layers.2.")]) for name, tensor in ours.items())


def test_experts_that_are_unlike_the_last_layers_are_refused_for_merging(tmp_path: Path) -> None:
    source = with_mtp("deepseek_v3", tmp_path)
    tensors = read_tensors(source)
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    rewrite(source, {**tensors, name: tensors[name][:4].clone()})
    path, _ = token_ids(tmp_path)
    with pytest.raises(InputError, match=r"experts\.5\.up_proj\.weight predicts further tokens .* set export\.mtp to drop"):
        run_all(source, tmp_path / "run", path, [4], ["stock"], export={"mtp": "merge"})


def test_refused_by_policy(tmp_path: Path) -> None:
    source = with_mtp("deepseek_v3", tmp_path)
    path, _ = token_ids(tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor model\.layers\.3\..*export\.mtp is error"):
        run_all(source, tmp_path / "run", path, [4], ["stock"], export={"mtp": "error"})
    assert not (tmp_path / "run" / "models").exists() and not [*(tmp_path / "run").glob("calibrate-*/layer*")]


def test_a_layer_that_the_config_does_not_know_is_refused(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    extra: dict[str, Tensor] = {"model.layers.3.input_layernorm.weight": torch.ones(32)}
    rewrite(source, {**read_tensors(source), **extra})
    with pytest.raises(InputError, match=r"tensor model\.layers\.3\.input_layernorm\.weight belongs to layer 3"):
        survey_checkpoint(str(source))
