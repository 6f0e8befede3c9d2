"""Cutting a model to layer shards: what a worker holds at once. The cut changes who computes, never what is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.config import Resources, TextData
from stages.common.errors import InputError
from stages.common.untrusted import read_small

LayerRange = tuple[int, int]

SHARDS_PER_WORKER = 4
"""Layer shards that each worker gets at least, where the layers suffice: while the first is read, and while the last is
computed, a worker does nothing else. Simulated clusters (bench/simulation.py) are the evidence."""


def weight_bytes(plan: Mapping[str, Any], layers: LayerRange) -> int:
    """Bytes of weights of a layer shard; with embedding, norm and head at both ends of the model."""
    first, stop = layers
    outside = plan["outside_bytes"] if first == 0 or stop == plan["num_layers"] else 0
    return int(sum(plan["layer_bytes"][first:stop]) + outside)


def held_bytes(plan: Mapping[str, Any], layers: LayerRange, data: TextData) -> int:
    """Memory in bytes that a worker needs for a layer shard: weights, the copy while loading, activations."""
    first, stop = layers
    layer_bytes: Sequence[int] = plan["layer_bytes"]
    hidden_size: int = plan["hidden_size"]
    vocab_size: int = plan["vocab_size"]
    itemsize = 4 if plan["dtype"] == "float32" else 2
    hidden = 2 * data.sequences_per_shard * data.sequence_length * hidden_size * itemsize
    logits = 2 * 4 * data.micro_batch * data.sequence_length * vocab_size if stop == plan["num_layers"] else 0
    return weight_bytes(plan, layers) + max(layer_bytes[first:stop]) + hidden + logits


def layer_shards(
    plan: Mapping[str, Any], data: TextData, resources: Resources, num_workers: int, num_rounds: int = SHARDS_PER_WORKER
) -> list[LayerRange]:
    """Contiguous layer ranges: as many layers each as fit in `worker_memory`, never fewer than one, and no more than leave
    each of num_workers num_rounds shards."""
    num_layers = plan["num_layers"]
    most = resources.layers_per_shard or max(1, num_layers // (num_rounds * num_workers))
    shards: list[LayerRange] = []
    first = 0
    while first < num_layers:
        stop = first + 1
        while stop < min(num_layers, first + most) and (
            resources.layers_per_shard or held_bytes(plan, (first, stop + 1), data) <= resources.worker_memory
        ):
            stop += 1
        shards.append((first, stop))
        first = stop
    return shards


@dataclass(frozen=True)
class Partition:
    """Layer shards as a stage keeps them, and the settings that they were made for."""

    asked: dict[str, Any]
    layer_shards: list[LayerRange]


_PARTITION = TypeAdapter(Partition)


def read_partition(path: Path, num_layers: int) -> Partition | None:
    """A kept partition; None if there is none that can be read and covers every layer once: it is then made anew."""
    try:
        kept = _PARTITION.validate_json(read_small(path))
    except (FileNotFoundError, InputError, ValidationError):
        return None
    ends = [0, *(stop for _, stop in kept.layer_shards)]
    firsts = [first for first, _ in kept.layer_shards]
    is_whole = firsts == ends[:-1] and ends[-1] == num_layers and all(first < stop for first, stop in pairwise(ends))
    return kept if is_whole else None
