"""Tiny checkpoints from real transformers configs, with random weights.

Three families in some detail (`FAMILIES`), and all that there are, every feature of a family present (`SETTINGS`, `build`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, logging

logging.set_verbosity_error()
logging.disable_progress_bar()

VOCAB_SIZE = 96
MAX_POSITIONS = 64
_COMMON = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS, "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Config class, what it is given, and the decoder layers that have experts."""

    config_class: str
    settings: dict[str, Any]
    moe_layers: tuple[int, ...]
    num_experts: int = 6


# qwen2_moe has a shared expert and does not renormalise gates, qwen3_moe does; both have a dense layer, at another place.
FAMILIES = {
    "mixtral": Family("MixtralConfig", {"intermediate_size": 48, "num_local_experts": 6}, (0, 1, 2)),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 6,
            "mlp_only_layers": [1],
        },
        (0, 2),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {
            "intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "head_dim": 8, "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
        (1, 2),
    ),
}  # fmt: skip


def random_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A model with random weights; the wide initialisation makes experts differ and routing vary.

    Every expert has negative zeros, which arithmetic turns to zeros: a copy keeps them. settings: of the config, on top.
    """
    config = getattr(transformers, FAMILIES[family].config_class)(**{**_COMMON, **FAMILIES[family].settings, **settings})
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data[:, 0, 0] = -0.0
    return model


def save_checkpoint(
    folder: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "60KB",
    **settings: Any,
) -> Path:
    """Save a random model as transformers does, over several weight files. settings: of its config, on top."""
    random_model(family, dtype, seed, **settings).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def random_ids(num_sequences: int = 8, sequence_length: int = 32, seed: int = 0) -> np.ndarray:
    """Token ids int64 [S, T]."""
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, (num_sequences, sequence_length))


def save_token_ids(path: Path, num_sequences: int = 8, sequence_length: int = 32, seed: int = 0) -> Path:
    """Save random token ids."""
    np.save(path, random_ids(num_sequences, sequence_length, seed))
    return path


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """The checkpoint as any user loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    model.eval().requires_grad_(False)
    return model


def logits(model: PreTrainedModel, ids_ST: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Logits [S, T, V] of a whole-model forward."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.as_tensor(ids_ST), use_cache=False).logits
    return found


NUM_EXPERTS = 8
_BASE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LOCAL = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
_PLAIN = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "n_shared_experts": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
_GROUPS = {"n_group": 2, "topk_group": 1}
_NO_GROUPS = {"n_group": 1, "topk_group": 1}
_LINEAR = {
    "head_dim": 16, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "full_attention_interval": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip
_SPARSE_INDEX = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}
_DENSE_FIRST = ["dense", "sparse", "sparse"]
_MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}

# What each family's config needs beyond _BASE to be small, with every feature of the family present.
SETTINGS: dict[str, dict[str, Any]] = {
    "afmoe": {**_PLAIN, "moe_intermediate_size": 24, "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 16},
    "aria_text": {"moe_num_experts": NUM_EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": {**_ROUTED, **_LATENT, **_GROUPS},
    "axk2": {**_ROUTED, **_LATENT, **_SPARSE_INDEX},
    "bailing_hybrid": {**_LATENT, **_GROUPS, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                       "num_mtp_layers": 0, "head_dim": 16, "layer_group_size": 2},
    "beam": {**_PLAIN, **_GROUPS, "moe_intermediate_size": 24, "mlp_layer_types": _DENSE_FIRST},
    "cohere2_moe": {**_PLAIN, "num_shared_experts": 1},
    "dbrx": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64, "attn_config": {"kv_n_heads": 2, "clip_qkv": 8},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": NUM_EXPERTS, "moe_top_k": 2, "hidden_size": 32}},
    "deepseek_v2": {**_ROUTED, **_LATENT, **_GROUPS, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_ROUTED, **_LATENT, **_GROUPS},
    "deepseek_v32": {**_ROUTED, **_LATENT, **_GROUPS, **_SPARSE_INDEX},
    "deepseek_v4": {**_ROUTED},
    "doge": {**_PLAIN, "is_moe": True},
    "dots1": {**_ROUTED, **_NO_GROUPS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {**_ROUTED, **_NO_GROUPS, **_LATENT, **_SPARSE_INDEX},
    "ernie4_5_moe": {"moe_num_experts": NUM_EXPERTS, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1,
                     "moe_layer_end_index": 2},
    "exaone_moe": {**_PLAIN, **_GROUPS, "moe_intermediate_size": 24, "head_dim": 16, "first_k_dense_replace": 1},
    "flex_olmo": {**_PLAIN},
    "flint": {**_PLAIN, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "head_dim": 16},
    "gemma4_text": {"enable_moe_block": True, "num_experts": NUM_EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 24,
                    "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "glm4_moe": {**_ROUTED, **_NO_GROUPS, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16},
    "glm4_moe_lite": {**_ROUTED, **_NO_GROUPS, **_LATENT},
    "glm_moe_dsa": {**_ROUTED, **_NO_GROUPS, **_LATENT, **_SPARSE_INDEX},
    "gpt_oss": {**_LOCAL, "head_dim": 16, "sliding_window": 16},
    "granitemoe": {**_LOCAL},
    "granitemoe_swa": {**_LOCAL},
    "granitemoehybrid": {**_LOCAL, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 4, "mamba_d_head": 16,
                         "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16, "shared_intermediate_size": 40},
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 40},
    "hunyuan_v1_moe": {"num_experts": NUM_EXPERTS, "moe_topk": 2, "head_dim": 16},
    "hy_v3": {**_PLAIN, "moe_intermediate_size": 24, "num_shared_experts": 1, "head_dim": 16},
    "hy_v4": {**_ROUTED, **_NO_GROUPS, **_LATENT, **_SPARSE_INDEX},
    "inkling_text": {**_ROUTED},
    "inkling2_text": {**_ROUTED},
    "jamba": {**_PLAIN, **_MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
              "mamba_dt_rank": 4},
    "jetmoe": {**_LOCAL, "kv_channels": 16},
    "kimi_linear": {**_LATENT, **_GROUPS, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "q_lora_rank": None,
                    "moe_intermediate_size": 24, "linear_head_dim": 16, "linear_num_heads": 4, "mlp_layer_types": _DENSE_FIRST,
                    "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "kolibri1": {**_LOCAL, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "head_dim": 16},
    "laguna": {**_PLAIN, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "head_dim": 16},
    "lfm2_moe": {**_PLAIN, "moe_intermediate_size": 24, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "intermediate_size_mlp": 48, "head_dim": 16,
                    "interleave_moe_layer_step": 2, "attention_chunk_size": 32},
    "longcat_flash": {**_LATENT, "n_routed_experts": NUM_EXPERTS, "moe_topk": 2, "zero_expert_num": 4,
                      "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48, "num_layers": 2},
    "mellum": {**_LOCAL, "moe_intermediate_size": 24, "head_dim": 16},
    "mimo_v2_flash": {**_ROUTED, **_NO_GROUPS, "head_dim": 16, "v_head_dim": 16},
    "minimax": {**_LOCAL, "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
                "block_size": 16},
    "minimax_m2": {**_LOCAL, "head_dim": 16},
    "minimax_m3_vl_text": {**_LOCAL},
    "mixtral": {**_LOCAL},
    "nemotron_h": {**_ROUTED, **_GROUPS, "layers_block_type": ["mamba", "moe", "attention", "moe"], "head_dim": 16,
                   "moe_shared_expert_intermediate_size": 40, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1,
                   "ssm_state_size": 8, "chunk_size": 16, "use_mamba_kernels": False},
    "olmoe": {**_PLAIN},
    "phimoe": {**_LOCAL},
    "qwen2_moe": {**_PLAIN, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "mlp_only_layers": [1]},
    "qwen3_moe": {**_PLAIN, "moe_intermediate_size": 24, "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    "qwen3_5_moe_text": {**_PLAIN, **_LINEAR},
    "qwen3_next": {**_PLAIN, **_LINEAR},
    "qwen4_exp_text": {**_PLAIN, **_LINEAR},
    "solar_open": {**_ROUTED, **_NO_GROUPS, "n_shared_experts": 1, "head_dim": 16},
    "zaya": {**_PLAIN, "num_experts_per_tok": 1, "moe_intermediate_size": 24},
}  # fmt: skip
# At least one family a code path; `test_families.py` says what tells them apart, and that none is missing. Where there is a
# choice, families with a trait of their own: convolution, linear attention, state space, latent attention with an index, sparse
# mixer, a scale for each expert.
ONE_A_CODE_PATH = (
    "aria_text", "deepseek_v2", "deepseek_v32", "ernie4_5_moe", "gemma4_text", "gpt_oss", "granitemoehybrid", "kimi_linear",
    "laguna", "lfm2_moe", "llama4_text", "minimax_m3_vl_text", "mixtral", "nemotron_h", "phimoe", "qwen3_next",
)  # fmt: skip


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of a family: its own class, small sizes."""
    return CONFIG_MAPPING[family](**{**_BASE, **SETTINGS[family], **changes})


def fill(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random weights that make every part matter: nothing is zero, correction biases neither, norms stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name or name.endswith(("A_log", "dt_bias")):
                continue
            noise = torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.08
            if name not in model.state_dict():
                continue
            tensor.copy_(noise + (1 if "norm" in name and tensor.ndim == 1 and name.endswith("weight") else 0))
    return model


def build(family: str, dtype: torch.dtype, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with random weights."""
    config = tiny_config(family, **changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, seed).eval()
    return model


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "100KB", save_original_format: bool = True) -> Path:
    """Save a checkpoint in several files: names of the hub, or (save_original_format False) transformers' fused tensors."""
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=save_original_format)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"]
    return folder
