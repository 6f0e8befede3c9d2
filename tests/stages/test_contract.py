"""The names of transformers that are not promised to stay: each as we rely on it, so that an upgrade fails here first."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, MixtralForCausalLM, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.integrations import moe
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.loading_report import LoadStateDictInfo

from stages.model.families import SUPPORTED
from tests.tiny import NUM_EXPERTS, build, save, tiny_config


def meta_model(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()


def test_version_is_in_the_tested_range() -> None:
    major, minor, *_ = transformers.__version__.split(".")
    assert (int(major), int(minor)) == (5, 23)


def test_conversion_of_names() -> None:
    model = meta_model("mixtral")
    mapping = get_model_conversion_mapping(model)
    assert all(isinstance(entry, WeightRenaming | WeightConverter) for entry in mapping)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    assert all(isinstance(entry.target_patterns, list) for entry in converters)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, model.state_dict())
    assert renamed == "model.layers.1.mlp.experts.down_proj"
    assert pattern is not None and "*" in pattern
    assert rename_source_key("lm_head.weight", renamings, converters, model.base_model_prefix, model.state_dict())[1] is None


def test_conversion_of_tensors_reads_slices_and_reports_problems(tmp_path: Path) -> None:
    whole = build("mixtral", torch.float32)
    folder = save(whole, tmp_path / "model", max_shard_size="1GB")
    model = meta_model("mixtral")
    config = LoadStateDictConfig(
        dtype=torch.float32, dtype_plan=model._get_dtype_plan(torch.float32), device_map={"": torch.device("cpu")},
        weight_mapping=get_model_conversion_mapping(model),
    )  # fmt: skip
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".layers.1." in name]  # noqa: SIM118
        info, _ = convert_and_load_state_dict_in_model(model, {name: file.get_slice(name) for name in names}, config)
    assert not info.conversion_errors and not info.error_msgs and not info.mismatched_keys
    loaded = {name: tensor for name, tensor in model.state_dict().items() if not tensor.is_meta}
    assert set(loaded) == {name for name in whole.state_dict() if ".layers.1." in name}
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in loaded.items())


def test_conversion_works_without_content_and_names_what_does_not_fit() -> None:
    model = meta_model("mixtral")
    config = LoadStateDictConfig(
        dtype=torch.float32, device_map={"": "meta"}, weight_mapping=get_model_conversion_mapping(model)
    )
    names = [f"model.layers.0.block_sparse_moe.experts.{i}.{w}.weight" for i in range(NUM_EXPERTS) for w in ("w1", "w3")]
    empty = {name: torch.empty(32, 48, device="meta") for name in names}
    info, _ = convert_and_load_state_dict_in_model(model, empty, config)
    problems = [*info.conversion_errors, *(found[0] for found in info.mismatched_keys)]
    assert problems == ["model.layers.0.mlp.experts.gate_up_proj"]


def test_attributes_of_a_model() -> None:
    model = meta_model("deepseek_v3")
    assert isinstance(model.get_decoder().layers, nn.ModuleList)
    assert isinstance(model.all_tied_weights_keys, dict)
    assert isinstance(model.base_model_prefix, str)
    assert any("layers" in pattern for pattern in model._keys_to_ignore_on_load_unexpected)
    assert callable(model._init_weights) and callable(model.tie_weights) and callable(type(model)._from_config)
    rotary = next(module for module in model.modules() if "inv_freq" in module._buffers)
    assert "inv_freq" in rotary._non_persistent_buffers_set


def test_rules_for_what_is_left_unloaded_in_silence() -> None:
    names = {
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.61.norm.weight", "model.layers.0.self_attn.extra.weight"
    }  # fmt: skip
    found = LoadStateDictInfo(set(), set(names), set(), [], {}, set())
    meta_model("deepseek_v3")._adjust_missing_and_unexpected_keys(found)
    assert found.unexpected_keys == {"model.layers.0.self_attn.extra.weight"}


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_experts_declare_their_layout(family: str) -> None:
    found = [module for name, module in meta_model(family).named_modules() if name.endswith(".experts")]
    assert found
    for module in found:
        assert module.num_experts == NUM_EXPERTS
        assert all(parameter.shape[0] == NUM_EXPERTS for parameter in module.parameters(recurse=False))
        if SUPPORTED[family].gates_input:
            assert not hasattr(module, "is_transposed")
            assert list(inspect.signature(module.forward).parameters) == ["hidden_states"]
            continue
        assert all(isinstance(getattr(module, flag), bool) for flag in ("is_transposed", "has_bias", "has_gate"))
        assert not module.has_post_expert_norm
        assert callable(module._apply_gate) if module.has_gate else callable(module.act_fn)


def test_the_default_way_to_run_experts_sums_as_the_statistics_do() -> None:
    assert "grouped_mm" in moe.ALL_EXPERTS_FUNCTIONS
    source = inspect.getsource(moe.grouped_mm_experts_forward)
    assert "view(num_tokens, num_top_k, hidden_dim).sum(dim=1)" in source
    assert build("mixtral", torch.float32).config._experts_implementation == "grouped_mm"


def test_registered_names_serve_a_class_of_others() -> None:
    mapping = get_checkpoint_conversion_mapping("mixtral")
    assert mapping

    class Ours(MixtralForCausalLM):
        pass

    Ours.__module__ = "transformers_modules.ours"
    with torch.device("meta"):
        ours = Ours(tiny_config("mixtral"))
    assert ours.is_custom_code()
    register_checkpoint_conversion_mapping("mixtral", mapping, overwrite=True)
    theirs: list[Any] = get_model_conversion_mapping(meta_model("mixtral"))
    found = get_model_conversion_mapping(ours)
    assert [str(entry.source_patterns) for entry in found] == [str(entry.source_patterns) for entry in theirs]


def test_packed_experts_become_values() -> None:
    blocks = torch.zeros(2, 6, 1, 16, dtype=torch.uint8)
    scales = torch.full((2, 6, 1), 127, dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert values.shape == (2, 32, 6) and values.dtype == torch.float32


def test_a_class_is_asked_how_its_experts_and_attention_may_run() -> None:
    assert MixtralForCausalLM._can_set_experts_implementation() is True
    assert MixtralForCausalLM._can_set_attn_implementation() is True


def test_an_auto_class_says_which_class_it_gives() -> None:
    config = tiny_config("mixtral")
    for auto, due in ((AutoModel, "MixtralModel"), (AutoModelForCausalLM, "MixtralForCausalLM")):
        assert type(config) in auto._model_mapping
        assert _get_model_class(config, auto._model_mapping).__name__ == due
    assert type(config) not in transformers.AutoModelForCTC._model_mapping


def test_only_other_engines_ask_whether_their_backend_may_run_a_class() -> None:
    assert callable(PreTrainedModel.is_backend_compatible)
    package = Path(transformers.__file__).parent
    asking = [path.name for path in package.rglob("*.py") if b"is_backend_compatible" in path.read_bytes()]
    assert asking == ["modeling_utils.py"]
