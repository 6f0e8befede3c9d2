"""Runs of the whole pipeline in this process, for tests of the stages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline import config as run_files
from pipeline.commands.run import run
from pipeline.display.progress import Reporter
from pipeline.driver.run_state import RunOptions
from pipeline.executors.local import LocalExecutor
from stages.contracts.settings import RunConfig
from stages.model.layer_shard import LayerShard

NUM_SEQUENCES, NUM_TOKENS = 4, 16


def token_ids(folder: Path) -> tuple[Path, Tensor]:
    """Token ids [4, 16] of the tiny vocabulary, as a file and as a tensor."""
    ids = np.random.default_rng(1).integers(3, 128, (NUM_SEQUENCES, NUM_TOKENS))
    path = folder / "ids.npy"
    np.save(path, ids)
    return path, torch.from_numpy(ids)


def run_config(
    source: Path | str, run_dir: Path, ids: Path, targets: list[Any], formats: list[str], **changes: Any
) -> RunConfig:
    """A run over token ids, without evaluation. changes: top-level settings."""
    settings = {
        "model": str(source),
        "run_dir": str(run_dir),
        "calibration": {
            "data": str(ids), "num_sequences": NUM_SEQUENCES, "sequence_length": NUM_TOKENS,
            "tokens_per_micro_batch": NUM_SEQUENCES * NUM_TOKENS,
        },
        "clustering": {"num_experts": targets},
        "resources": {"layers_per_shard": 2},
        **changes,
    }  # fmt: skip
    settings["export"] = {"formats": formats, "max_file_bytes": "200 kB", **changes.get("export", {})}
    return run_files.read_config(settings)


def run_all(
    source: Path | str, run_dir: Path, ids: Path, targets: list[Any], formats: list[str], **changes: Any
) -> dict[str, Path]:
    """Run the pipeline; return the folders of its exports by the end of their name, such as `4e-tied`."""
    config = run_config(source, run_dir, ids, targets, formats, **changes)
    run(config, LocalExecutor, Reporter(Console(quiet=True)), RunOptions())
    return {path.name.removeprefix(f"{config.name}-"): path for path in (run_dir / "models").iterdir()}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """The checkpoint as any user loads it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    model.eval()
    return model


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its tensors in memory of their own.

    transformers leaves weights where a file's header happens to put them in its mapped pages; some float32 kernels take another
    path there than in memory that torch allocated, and differ in the last bit. Ours are always the latter.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of the whole model."""
    with torch.inference_mode():
        found: Tensor = model(ids, use_cache=False).logits
    return found


def streamed_logits(checkpoint: Any, num_layers: int, ids: Tensor, step: int = 2) -> Tensor:
    """Logits [B, T, V] by layer shards of `step` layers."""
    hidden = None
    for first in range(0, num_layers, step):
        shard = LayerShard(checkpoint, first, min(first + step, num_layers), num_threads=1)
        hidden = shard.embed(ids) if hidden is None else hidden
        for layer in range(shard.first, shard.stop):
            hidden = shard.run_layer(layer, hidden)
    assert hidden is not None
    return shard.logits(hidden)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name)
    return found


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    """The same as bytes, which also compare where a tensor holds NaN."""
    tensors = read_tensors(folder)
    return {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def rewrite(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """Make a folder's weights one file with these tensors; config: replaces `config.json`."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The raw `config.json`."""
    return dict(json.loads((folder / "config.json").read_text()))
