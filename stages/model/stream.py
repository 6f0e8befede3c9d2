"""A token shard's way through a layer shard: from token ids or stored hidden states to stored hidden states or logits."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from stages.contracts.tokens import read_tokens
from stages.io.files import WrittenFile, write_bytes
from stages.io.storage import is_remote
from stages.model.layer_shard import LayerShard

_KEY = "hidden_states"


def read_token_ids(path: Path) -> Tensor:
    """Token ids int64 [S, T] of a token shard."""
    return torch.from_numpy(read_tokens(path))


def micro_batches(batch: Tensor, size: int) -> Iterator[Tensor]:
    """Cut [S, ...] to pieces of `size` sequences. Results are not bitwise batch-invariant, so the size is a setting."""
    yield from batch.split(size)


def enter(shard: LayerShard, token_ids_ST: Tensor, hidden_file: Path | None, micro_batch: int) -> list[Tensor]:
    """Hidden states [B, T, D] of each micro-batch as they enter the layer shard.

    hidden_file: what the shard before wrote; None for the first layer shard, which embeds the tokens.
    """
    if hidden_file is None:
        return [shard.embed(ids) for ids in micro_batches(token_ids_ST, micro_batch)]
    hidden_STD = (load(hidden_file.read_bytes()) if is_remote(hidden_file) else load_file(hidden_file))[_KEY]
    return [hidden.to(shard.device) for hidden in micro_batches(hidden_STD, micro_batch)]


def run_layers(
    shard: LayerShard,
    hidden: list[Tensor],
    watch: Callable[[int], AbstractContextManager[Any]] = lambda layer: nullcontext(),
) -> list[Tensor]:
    """Run every layer of the shard over all micro-batches, layer by layer; `watch(layer)` surrounds each."""
    for layer in range(shard.first, shard.stop):
        with watch(layer):
            hidden = [shard.run_layer(layer, hidden_BTD) for hidden_BTD in hidden]
    return hidden


def leave(path: Path, hidden: list[Tensor]) -> WrittenFile:
    """Store the hidden states [S, T, D] for the layer shard that follows, in the model's own dtype."""
    return write_bytes(path, save({_KEY: torch.cat(hidden).contiguous().cpu()}))
