"""Tiny checkpoints from real transformers configs, with random weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

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
    transformers.utils.logging.disable_progress_bar()
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


def logits(model: PreTrainedModel, ids_ST: np.ndarray) -> torch.Tensor:
    """Logits [S, T, V] of a whole-model forward."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.from_numpy(ids_ST), use_cache=False).logits
    return found
