"""Layers that predict further tokens: transformers does not load them; they are dropped with their count, or refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.contracts.errors import InputError
from stages.model.survey import survey_checkpoint
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
