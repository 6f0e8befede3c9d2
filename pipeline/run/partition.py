"""Cutting a model to layer shards: what a worker holds at once. The cut changes who computes, never what is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.config import Calibration, Evaluation, Resources, TextData
from stages.contracts.errors import InputError
from stages.io.untrusted import read_small

LayerRange = tuple[int, int]

SHARDS_PER_WORKER = 4
"""Layer shards that each worker gets at least, where the layers suffice: while the first is read, and while the last is
computed, a worker does nothing else. Simulated clusters (bench/simulation.py) are the evidence."""
_CHUNK_BYTES = 1 << 28
"""The most that calibrate makes of first products at a time; on a CPU it is less."""
_FRAGMENTS = 8
"""Of memory that is taken and given back, an eighth more is counted: allocators keep pieces."""


def weight_bytes(plan: Mapping[str, Any], layers: LayerRange) -> int:
    """Bytes of weights of a layer shard; with embedding, norm and head at both ends of the model."""
    first, stop = layers
    outside = plan["outside_bytes"] if first == 0 or stop == plan["num_layers"] else 0
    return int(sum(plan["layer_bytes"][first:stop]) + outside)


def held_bytes(plan: Mapping[str, Any], layers: LayerRange, data: TextData) -> int:
    """Memory in bytes that a worker needs for a layer shard, beside a Python process with torch: the most of what calibrate and
    evaluate allocate.

    Weights count as loaded, and once more for the largest layer, which some families need while they are converted. Experts
    that calibrate maps on a CPU take less: their pages belong to the system's file cache.
    """
    first, stop = layers
    layer_bytes: Sequence[int] = plan["layer_bytes"]
    itemsize = _itemsize(plan)
    # a layer's input and output; at the end the input, all of it in one piece, and as the bytes of a file
    hidden = 3 * data.sequences_per_shard * data.sequence_length * plan["hidden_size"] * itemsize
    inside = max(_activation_bytes(plan, layer, data) for layer in range(first, stop))
    if stop == plan["num_layers"] and isinstance(data, Evaluation):
        # logits, their copy in float32 and the logarithms of its softmax; an allocator may not have given back the layers' yet
        inside += data.micro_batch * data.sequence_length * plan["vocab_size"] * (itemsize + 4 + 4)
    changing = hidden + inside + _sum_bytes(plan, layers, data)
    return weight_bytes(plan, layers) + max(layer_bytes[first:stop]) + int(changing + changing // _FRAGMENTS)


def _itemsize(plan: Mapping[str, Any]) -> int:
    return 4 if plan["dtype"] == "float32" else 2


def _activation_bytes(plan: Mapping[str, Any], layer: int, data: TextData) -> int:
    """What a micro-batch takes inside of a layer. Widths follow from bytes: a matrix [width, hidden size] makes `width` values
    of a token, so bytes over the hidden size are bytes a token."""
    num_tokens, hidden_size = data.micro_batch * data.sequence_length, plan["hidden_size"]
    expert_bytes = plan["layer_expert_bytes"][layer]
    rest = (plan["layer_bytes"][layer] - expert_bytes) // hidden_size + 2 * hidden_size * 4  # attention; norms in float32
    products = expert_bytes // plan["num_experts"] // hidden_size  # of one expert: gate, up, and what W_down meets
    # of a routed pair: products; what enters, and what leaves in the model's dtype and times its gate; five indices
    pair = products + hidden_size * (2 * _itemsize(plan) + 4) + 5 * 8 if expert_bytes else 0
    chunk = min(_CHUNK_BYTES, num_tokens * products)
    return int(num_tokens * (rest + plan["top_k"] * pair) + chunk)


def _sum_bytes(plan: Mapping[str, Any], layers: LayerRange, data: TextData) -> int:
    """Sums of activations in float64: those of all layers of the shard at once, or those of all token shards of a layer."""
    sampling = data.sampling if isinstance(data, Calibration) else None
    values = max(plan["layer_expert_bytes"]) // (3 * _itemsize(plan) * plan["hidden_size"])  # experts times intermediate size
    copies = max(layers[1] - layers[0], data.num_shards) + 2
    return int(8 * values * (sampling.groups if sampling else 1) * copies)


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
