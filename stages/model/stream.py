"""Runs a token shard through a layer shard: from token ids or stored hidden states to stored hidden states or logits.

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
    """Hidden states that pass through a layer shard. A unit may send several streams through the same layers, such as those of
    the source and of a student whose experts are replaced.

    reads: file that the previous layer shard wrote; None for the first one, which embeds the tokens. writes: file for the next
    layer shard; None if nothing reads it. around: given a layer, the context in which this stream passes it: a watcher,
    `replaced_forward`, or several of them. see_logits: called with logits [B, T, V] and token ids [B, T] of each micro-batch
    after the model's last layer.
    """

    reads: Path | None = None
    writes: Path | None = None
    around: Callable[[int], AbstractContextManager[Any]] = lambda layer: nullcontext()
    see_logits: Callable[[Tensor, Tensor], None] | None = None


@dataclass(frozen=True)
class Passed:
    """Hidden states [B, T, D] of each micro-batch after the layer shard, by stream, and the written files."""

    hidden: Mapping[str, list[Tensor]]
    files: tuple[WrittenFile, ...]


def read_token_ids(path: Path) -> Tensor:
    """Token ids int64 [S, T] of a token shard, NO_TOKEN where it is padded."""
    return torch.from_numpy(read_tokens(path))


def pass_through(shard: LayerShard, token_ids_ST: Tensor, micro_batch: int, streams: Mapping[str, Stream]) -> Passed:
    """Run a token shard through a layer shard, layer by layer. In every layer the streams run one after another, in order.

    micro_batch: sequences per micro-batch. This is a setting, because the bits of results depend on it.
    """
    ids = list(token_ids_ST.split(micro_batch))
    hidden = {name: read_hidden(shard, ids, stream.reads) for name, stream in streams.items()}
    for layer in range(shard.first, shard.stop):
        for name, stream in streams.items():
            with stream.around(layer):
                hidden[name] = [shard.run_layer(layer, hidden_BTD) for hidden_BTD in hidden[name]]
    files = [write_hidden(stream.writes, hidden[name]) for name, stream in streams.items() if stream.writes is not None]
    for name, stream in streams.items():
        if stream.see_logits is not None:
            for hidden_BTD, ids_BT in zip(hidden[name], ids, strict=True):
                stream.see_logits(shard.logits(hidden_BTD), ids_BT)
    return Passed(hidden, tuple(files))


def hidden_files(part_dir: Path, args: StreamArgs, shard: LayerShard) -> tuple[Path | None, Path | None]:
    """Files from which a layer shard reads hidden states and to which it writes them; None at the model's ends."""
    reads = hidden_file(part_dir, shard.first, args.shard) if shard.first else None
    writes = None if args.is_last else hidden_file(part_dir, shard.stop, args.shard)
    return reads, writes


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace a module's forward by another one, such as the forward of a layer's experts, while the context lasts."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:  # packed experts have a forward of their own (layer_shard.py)
            module.forward = before


def read_hidden(shard: LayerShard, ids: list[Tensor], path: Path | None) -> list[Tensor]:
    """Hidden states [B, T, D] of each micro-batch at the input of the layer shard. Padding is embedded as token 0: any token
    will do, as nothing before it sees it."""
    if path is None:
        return [shard.embed(ids_BT.clamp(min=0)) for ids_BT in ids]
    hidden_STD = (load(path.read_bytes()) if is_remote(path) else load_file(path))[_KEY]
    return [hidden_BTD.to(shard.device) for hidden_BTD in hidden_STD.split([len(ids_BT) for ids_BT in ids])]


def write_hidden(path: Path, hidden: list[Tensor]) -> WrittenFile:
    """Store the hidden states [S, T, D] in the model's own dtype."""
    return write_bytes(path, save({_KEY: torch.cat(hidden).contiguous().cpu()}))
