"""How weights lie on disk: fused or one by one, over several files, under a multimodal wrapper's prefix."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, PreTrainedModel

from stages.checkpoint.folder import Checkpoint
from tests.runs import read_config, read_tensors, run_all, tensor_bytes, token_ids
from tests.tiny import NUM_EXPERTS, build, fill, load, logits, save, tiny_config

ONE_BY_ONE = ["mixtral", "qwen3_moe", "deepseek_v3", "minimax_m2", "ernie4_5_moe", "jamba", "lfm2_moe", "hunyuan_v1_moe"]


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_fused_and_single_tensors_give_the_same_model(family: str, tmp_path: Path) -> None:
    model = build(family, torch.float32)
    path, ids = token_ids(tmp_path)
    found = []
    for is_fused in (False, True):
        source = save(model, tmp_path / f"source-{is_fused}", save_original_format=not is_fused)
        exports = run_all(source, tmp_path / f"run-{is_fused}", path, [NUM_EXPERTS, 4], ["stock"])
        assert tensor_bytes(exports[f"{NUM_EXPERTS}e-stock"]) == tensor_bytes(source)
        names = Checkpoint(exports["4e-stock"]).tensors
        assert set(names) <= set(Checkpoint(source).tensors)
        assert any(name.endswith("experts.gate_up_proj") for name in names) == is_fused
        found.append(logits(load(exports["4e-stock"]), ids))
    assert torch.equal(*found)


def test_experts_of_a_layer_may_lie_in_different_files(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source", max_shard_size="20KB")
    files = {entry.file for name, entry in Checkpoint(source).tensors.items() if "layers.0" in name and "experts" in name}
    assert len(files) > 1
    path, ids = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [NUM_EXPERTS, 3], ["stock", "tied"])
    assert tensor_bytes(exports[f"{NUM_EXPERTS}e-stock"]) == tensor_bytes(source)
    assert torch.isfinite(logits(load(exports["3e-tied"], trust_remote_code=True), ids)).all()


def wrapper_config(family: str) -> Any:
    text = tiny_config({"qwen3_5_moe": "qwen3_5_moe_text", "llama4": "llama4_text"}[family]).to_dict()
    vision = {
        "qwen3_5_moe": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
                        "patch_size": 4, "num_position_embeddings": 16},
        "llama4": {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
                   "image_size": 16, "patch_size": 4, "vision_output_dim": 32, "projector_input_dim": 32,
                   "projector_output_dim": 32},
    }[family]  # fmt: skip
    return AutoConfig.for_model(family, text_config=text, vision_config=vision)


def wrapped(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return fill(AutoModelForImageTextToText.from_config(wrapper_config(family), dtype=torch.float32)).eval()


@pytest.mark.parametrize("family", ["qwen3_5_moe", "llama4"])
def test_language_model_of_a_multimodal_wrapper(family: str, tmp_path: Path) -> None:
    source = save(wrapped(family), tmp_path / "source")
    path, ids = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [NUM_EXPERTS, 4], ["stock", "tied"])
    assert tensor_bytes(exports[f"{NUM_EXPERTS}e-stock"]) == tensor_bytes(source)
    config, before = read_config(exports["4e-stock"]), read_config(source)
    assert {key for key in before if before[key] != config[key]} == {"text_config"}
    text, text_before = config["text_config"], before["text_config"]
    assert {key for key in text_before if text_before[key] != text[key]} <= {"num_experts", "num_local_experts"}
    vision = {name for name in read_tensors(source) if "vis" in name.split(".")[0] + name.split(".")[1]}
    assert vision and all(tensor_bytes(exports["4e-stock"])[name] == tensor_bytes(source)[name] for name in vision)
    whole, info = AutoModelForImageTextToText.from_pretrained(exports["4e-stock"], output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    stock = logits(load(exports["4e-stock"]), ids)
    torch.testing.assert_close(logits(whole.eval(), ids), stock)
    tied = load(exports["4e-tied"], trust_remote_code=True)
    assert torch.isfinite(logits(tied, ids)).all()
    for auto in (AutoModel, AutoModelForImageTextToText):
        with pytest.raises(ValueError, match="runs as its language model alone, by AutoModelForCausalLM"):
            auto.from_pretrained(exports["4e-tied"], trust_remote_code=True)
    tied.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again", trust_remote_code=True), ids), logits(tied, ids))


def test_small_files_are_carried_over_and_the_card_tells_how_to_make_it_again(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    small = {"chat_template.jinja": "{{ messages }}", "tokenizer_config.json": "{}", "README.md": "theirs", "LICENSE": "free"}
    for name, text in small.items():
        (source / name).write_text(text)
    path, _ = token_ids(tmp_path)
    folder = run_all(source, tmp_path / "run", path, [3], ["tied"])["3e-tied"]
    for name, text in small.items():
        if name != "README.md":
            assert (folder / name).read_text() == text
    assert (folder / "SOURCE_README.md").read_text() == "theirs"
    assert (folder / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    card = (folder / "README.md").read_text()
    assert str(tmp_path) not in card, "it is published: nobody else has these folders"
    for stated in (
        source.name,
        "8 experts a layer merged to 3",
        path.name,
        "average",
        "hcsmoe run run.yaml",
        "formats:\n  - tied",
    ):
        assert stated in card
