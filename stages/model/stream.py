"""A token shard's way through a layer shard: from token ids or stored hidden states to stored hidden states or logits.

Dimensions: S sequences, B sequences of a micro-batch, T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

from stages.contracts.paths import hidden_file
from stages.contracts.stream_units import StreamArgs
from stages.contracts.tokens import read_tokens
from stages.io.files import WrittenFile, write_bytes
from stages.io.storage import is_remote
from stages.model.layer_shard import LayerShard

_KEY = "hidden_states"


@dataclass(frozen=True)
class Stream:
    """Hidden states on their way. A unit may send several through the same layers, such as the source's and those of a student
    whose experts are replaced.

    reads: file that the layer shard before wrote; None for the first one, which embeds the tokens.
    writes: file for the layer shard that follows; None where nothing reads it.
    around: given a layer, the context in which this stream passes it: a watcher, `replaced_forward`, or several of them.
    see_logits: given logits [B, T, V] and token ids [B, T] of each micro-batch after the model's last layer.
    """

    reads: Path | None = None
    writes: Path | None = None
    around: Callable[[int], AbstractContextManager[Any]] = lambda layer: nullcontext()
    see_logits: Callable[[Tensor, Tensor], None] | None = None


@dataclass(frozen=True)
class Passed:
    """Hidden states [B, T, D] of each micro-batch behind the layer shard, by stream, and the files that were written."""

    hidden: Mapping[str, list[Tensor]]
    files: tuple[WrittenFile, ...]


def read_token_ids(path: Path) -> Tensor:
    """Token ids int64 [S, T] of a token shard."""
    return torch.from_numpy(read_tokens(path))


def pass_through(shard: LayerShard, token_ids_ST: Tensor, micro_batch: int, streams: Mapping[str, Stream]) -> Passed:
    """Run a token shard through a layer shard, layer by layer; every layer is passed by one stream after another, in order.

    micro_batch: sequences. Results are not bitwise batch-invariant, so this is a setting.
    """
    ids = list(token_ids_ST.split(micro_batch))
    hidden = {name: _enter(shard, ids, stream.reads) for name, stream in streams.items()}
    for layer in range(shard.first, shard.stop):
        for name, stream in streams.items():
            with stream.around(layer):
                hidden[name] = [shard.run_layer(layer, hidden_BTD) for hidden_BTD in hidden[name]]
    files = [_leave(stream.writes, hidden[name]) for name, stream in streams.items() if stream.writes is not None]
    for name, stream in streams.items():
        if stream.see_logits is not None:
            for hidden_BTD, ids_BT in zip(hidden[name], ids, strict=True):
                stream.see_logits(shard.logits(hidden_BTD), ids_BT)
    return Passed(hidden, tuple(files))


def hidden_files(part_dir: Path, args: StreamArgs, shard: LayerShard) -> tuple[Path | None, Path | None]:
    """Files that a token shard's hidden states are read from and written to at a layer shard; None at the model's ends."""
    reads = hidden_file(part_dir, shard.first, args.shard) if shard.first else None
    writes = None if args.is_last else hidden_file(part_dir, shard.stop, args.shard)
    return reads, writes


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Have another forward stand in for a module's own, such as that of a layer's experts."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _enter(shard: LayerShard, ids: list[Tensor], path: Path | None) -> list[Tensor]:
    """Hidden states [B, T, D] of each micro-batch as they enter the layer shard."""
    if path is None:
        return [shard.embed(ids_BT) for ids_BT in ids]
    hidden_STD = (load(path.read_bytes()) if is_remote(path) else load_file(path))[_KEY]
    return [hidden_BTD.to(shard.device) for hidden_BTD in hidden_STD.split([len(ids_BT) for ids_BT in ids])]


def _leave(path: Path, hidden: list[Tensor]) -> WrittenFile:
    """Store the hidden states [S, T, D] in the model's own dtype."""
    return write_bytes(path, save({_KEY: torch.cat(hidden).contiguous().cpu()}))
