"""Models to measure on: real architectures with seeded random weights, in hub layout, over several files.

Experts come in planted groups, so that clusterings mean something: an expert is its group's tensor plus a smaller one of its
own. Written tensor by tensor: no file, let alone a model, is ever in memory.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from stages.checkpoint.folder import CONFIG_FILE, INDEX_FILE
from stages.checkpoint.headers import write_header
from stages.io.files import write_file, write_json

OWN_SHARE = 0.3
"""Standard deviation of what is an expert's own, in that of its group's tensor."""
IDS_FILE = "ids.npy"
_DTYPE_CODES = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class Spec:
    """A model to generate.

    settings: of the config class. A half of its experts are the first of a planted group, so merging to half finds the
    groups again. max_file_bytes: of a weight file. num_sequences, sequence_length: of its calibration tokens. dtype: of the
    weights, "bfloat16" or "float32", as torch names it.
    """

    config_class: str
    settings: dict[str, Any]
    max_file_bytes: int
    num_sequences: int
    sequence_length: int
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def config(self) -> Any:
        """The transformers config."""
        return getattr(transformers, self.config_class)(**self.settings, tie_word_embeddings=False, dtype=self.dtype)

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return int(self.settings.get("num_local_experts") or self.settings["num_experts"])

    @property
    def num_groups(self) -> int:
        """Planted groups of a layer: expert e is of group e modulo this number."""
        return self.num_experts // 2


def _mixtral(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "num_local_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip


_FINE = {
    "num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 192,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192, "num_experts": 64,
    "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
_TRUE = (4096, 14336, 32, 8, 32000)  # mistralai/Mixtral-8x7B-v0.1: hidden, intermediate, heads, kv_heads, vocab
MODELS = {
    "tiny": Spec("MixtralConfig", _mixtral(2, 64, 96, 4, 2, 256), 200_000, 4, 64),
    "mid": Spec("MixtralConfig", _mixtral(8, 512, 1792, 8, 4, 8192), 100_000_000, 16, 512),
    "mid-f32": Spec("MixtralConfig", _mixtral(8, 512, 1792, 8, 4, 8192), 200_000_000, 16, 512, "float32"),
    "fine": Spec("Qwen3MoeConfig", _FINE, 80_000_000, 16, 512),
    "true-layer-f32": Spec("MixtralConfig", _mixtral(1, *_TRUE), 3_000_000_000, 2, 512, "float32"),
    "true-1": Spec("MixtralConfig", _mixtral(1, *_TRUE), 3_000_000_000, 2, 512),
    "true-layer": Spec("MixtralConfig", _mixtral(2, *_TRUE), 1_500_000_000, 2, 512),
    "true-4": Spec("MixtralConfig", _mixtral(4, *_TRUE), 3_000_000_000, 2, 512),
    "deep": Spec("MixtralConfig", _mixtral(8, *_TRUE), 4_900_000_000, 2, 512),
}


@dataclass(frozen=True)
class _Planned:
    """A tensor to write. group: name of the tensor that it shares with its planted group; empty for any but an expert's."""

    name: str
    shape: tuple[int, ...]
    group: str = ""

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Size in a dtype."""
        return dtype.itemsize * int(np.prod(self.shape))


def _planned(spec: Spec) -> Iterator[_Planned]:
    """Every tensor in the order of the layers, under the names that the hub's checkpoints have."""
    config = spec.config
    hidden, is_qwen = config.hidden_size, spec.config_class == "Qwen3MoeConfig"
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    block = "mlp" if is_qwen else "block_sparse_moe"
    gate, down, up = ("gate_proj", "down_proj", "up_proj") if is_qwen else ("w1", "w2", "w3")
    inner = config.moe_intermediate_size if is_qwen else config.intermediate_size
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield _Planned("model.embed_tokens.weight", (config.vocab_size, hidden))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}.items():
            yield _Planned(f"{prefix}.self_attn.{name}_proj.weight", shape)
        if is_qwen:
            yield from (_Planned(f"{prefix}.self_attn.{name}_norm.weight", (head,)) for name in "qk")
        yield _Planned(f"{prefix}.{block}.gate.weight", (spec.num_experts, hidden))
        for expert in range(spec.num_experts):
            for name, shape in {gate: (inner, hidden), down: (hidden, inner), up: (inner, hidden)}.items():
                group = f"{prefix}.group.{expert % spec.num_groups}.{name}"
                yield _Planned(f"{prefix}.{block}.experts.{expert}.{name}.weight", shape, group)
        yield from (_Planned(f"{prefix}.{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention"))
    yield _Planned("model.norm.weight", (hidden,))
    yield _Planned("lm_head.weight", (config.vocab_size, hidden))


def _normal(key: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 numbers that depend on key and seed only, not on the order of writing."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")))


def _values(tensor: _Planned, dtype: torch.dtype, seed: int) -> Tensor:
    """Weights that keep the scale of what they are applied to. Embeddings share a direction, as those of trained models do."""
    if len(tensor.shape) == 1:
        return torch.ones(tensor.shape, dtype=dtype)
    values = _normal(tensor.group or tensor.name, seed, tensor.shape)
    if tensor.group:
        values.add_(_normal(tensor.name, seed, tensor.shape), alpha=OWN_SHARE)
    if tensor.name.endswith("embed_tokens.weight"):
        return (values + _normal("direction", seed, tensor.shape[1:])).to(dtype)
    return values.mul_(tensor.shape[1] ** -0.5).to(dtype)


def _files(tensors: list[_Planned], dtype: torch.dtype, max_file_bytes: int) -> list[list[_Planned]]:
    files: list[list[_Planned]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.num_bytes(dtype) for t in (*files[-1], tensor)) > max_file_bytes:
            files.append([])
        files[-1].append(tensor)
    return files


def generate(name: str, folder: Path, seed: int = 0) -> Path:
    """Write model `name` of MODELS and its calibration token ids. A folder that has an index is complete and kept."""
    if (folder / INDEX_FILE).exists():
        return folder
    spec = MODELS[name]
    dtype = spec.torch_dtype
    files = _files(list(_planned(spec)), dtype, spec.max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"

        def write(out: Any, tensors: list[_Planned] = tensors) -> None:
            write_header(out, ((t.name, _DTYPE_CODES[dtype], t.shape, t.num_bytes(dtype)) for t in tensors), {"format": "pt"})
            for tensor in tensors:
                out.write(_values(tensor, dtype, seed).view(-1).view(torch.uint8).numpy().data)

        write_file(folder / file, write)
        weight_map |= {tensor.name: file for tensor in tensors}
    config = json.loads(spec.config.to_json_string(use_diff=False))
    config["architectures"] = [spec.config_class.removesuffix("Config") + "ForCausalLM"]
    write_json(folder / CONFIG_FILE, config)
    ids = np.random.default_rng(seed).integers(0, config["vocab_size"], (spec.num_sequences, spec.sequence_length))
    write_file(folder / IDS_FILE, lambda out: np.save(out, ids))
    total = sum(tensor.num_bytes(dtype) for tensors in files for tensor in tensors)
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def main() -> None:
    """Generate one model: `python -m bench.models deep FOLDER`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(generate(args.name, args.folder, args.seed))


if __name__ == "__main__":
    main()
