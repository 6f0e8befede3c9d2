"""Partition of a model into layer shards. A worker holds one shard at a time.
The partition affects who computes, not the result."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from stages.contracts.errors import InputError
from stages.contracts.settings import Resources
from stages.contracts.survey import Survey
from stages.contracts.text_settings import Calibration, Evaluation, TextData
from stages.io.untrusted import read_small

LayerRange = tuple[int, int]

SHARDS_PER_WORKER = 4
"""Minimum number of layer shards per worker, if the model has enough layers. A worker reads its next shard while it computes,
but nothing overlaps with reading its first shard or computing its last one; more shards shorten both phases. Simulated clusters
(bench/simulation.py) are the evidence."""
_CHUNK_BYTES = 1 << 28
"""Most bytes of first products that calibrate makes at a time on a GPU; on a CPU it makes fewer."""
_FRAGMENTS = 8
"""Memory that is allocated and freed repeatedly is counted with one eighth more, because allocators keep fragments."""


def weight_bytes(survey: Survey, layers: LayerRange) -> int:
    """Bytes of weights of a layer shard. The first and the last shard also count embedding, norm and head."""
    first, stop = layers
    outside = survey.outside_bytes if first == 0 or stop == survey.num_layers else 0
    return sum(survey.layer_held_bytes[first:stop]) + outside


def _loading_bytes(survey: Survey, layer: int) -> int:
    """Bytes beside a layer's weights: a copy while they are converted; where experts stay packed, a copy of the rest, and the
    values of one expert in float32 and in the model's dtype."""
    if survey.layer_held_bytes[layer] == survey.layer_bytes[layer]:
        return survey.layer_bytes[layer]
    experts = survey.layer_expert_bytes[layer]
    return survey.layer_bytes[layer] - experts + 3 * experts // survey.num_experts


def held_bytes(survey: Survey, layers: LayerRange, data: TextData) -> int:
    """Memory in bytes that a worker needs for a layer shard, in addition to a Python process with torch: the larger of the
    needs of calibrate and evaluate.

    Weights count as loaded, and the largest layer counts twice, because some families need a copy while weights are converted.
    Experts that are packed on disk count packed, with one of them unpacked. Experts that calibrate maps on a CPU take less:
    their pages belong to the system's file cache.
    """
    first, stop = layers
    itemsize = survey.itemsize
    # a layer's input and output; at the end also the input in one piece, and its bytes for the file
    hidden = 3 * data.sequences_per_shard * data.sequence_length * survey.hidden_size * itemsize
    inside = max(_activation_bytes(survey, layer, data) for layer in range(first, stop))
    if stop == survey.num_layers and isinstance(data, Evaluation):
        # logits, their float32 copy and its log-softmax; the allocator may not have freed the layers' activations yet
        inside += data.micro_batch * data.sequence_length * survey.vocab_size * (itemsize + 4 + 4)
    changing = hidden + inside + _sum_bytes(survey, layers, data)
    loading = max(_loading_bytes(survey, layer) for layer in range(first, stop))
    return weight_bytes(survey, layers) + loading + int(changing + changing // _FRAGMENTS)


def _activation_bytes(survey: Survey, layer: int, data: TextData) -> int:
    """Bytes that a micro-batch takes inside a layer. Widths follow from bytes: a matrix [width, hidden size] makes `width`
    values per token, so its bytes divided by the hidden size are bytes per token."""
    num_tokens, hidden_size = data.micro_batch * data.sequence_length, survey.hidden_size
    expert_bytes = survey.layer_expert_bytes[layer]
    rest = (survey.layer_bytes[layer] - expert_bytes) // hidden_size + 2 * hidden_size * 4  # attention; norms in float32
    products = expert_bytes // survey.num_experts // hidden_size  # of one expert: gate, up, and the input of W_down
    # of a routed pair: products; input, output in the model's dtype, output times its gate; five indices
    pair = products + hidden_size * (2 * survey.itemsize + 4) + 5 * 8 if expert_bytes else 0
    chunk = min(_CHUNK_BYTES, num_tokens * products)
    return num_tokens * (rest + survey.top_k * pair) + chunk


def _sum_bytes(survey: Survey, layers: LayerRange, data: TextData) -> int:
    """Bytes of float64 activation sums: of the shard's layers for one token shard, and room to add up those of one layer."""
    sampling = data.sampling if isinstance(data, Calibration) else None
    values = max(survey.layer_expert_bytes) // (3 * survey.itemsize * survey.hidden_size)  # experts times intermediate size
    copies = layers[1] - layers[0] + 3
    return 8 * values * (sampling.groups if sampling else 1) * copies


def layer_shards(
    survey: Survey, data: TextData, resources: Resources, num_workers: int, num_rounds: int = SHARDS_PER_WORKER
) -> list[LayerRange]:
    """Contiguous layer ranges. Each has at least one layer and at most as many as fit in `worker_memory`. Ranges stay short
    enough that each of num_workers workers gets about num_rounds of them."""
    num_layers = survey.num_layers
    most = resources.layers_per_shard or max(1, num_layers // (num_rounds * num_workers))
    shards: list[LayerRange] = []
    first = 0
    while first < num_layers:
        stop = first + 1
        while stop < min(num_layers, first + most) and (
            resources.layers_per_shard or held_bytes(survey, (first, stop + 1), data) <= resources.worker_memory
        ):
            stop += 1
        shards.append((first, stop))
        first = stop
    return shards


@dataclass(frozen=True)
class Partition:
    """The layer shards that a stage has stored, and the settings from which they were computed."""

    asked: Mapping[str, JsonValue]
    layer_shards: list[LayerRange]


_PARTITION = TypeAdapter(Partition)


def read_partition(path: Path, num_layers: int) -> Partition | None:
    """A stored partition; None if it is missing, unreadable or does not cover every layer once.
    The caller then computes a new one."""
    try:
        kept = _PARTITION.validate_json(read_small(path))
    except (FileNotFoundError, InputError, ValidationError):
        return None
    ends = [0, *(stop for _, stop in kept.layer_shards)]
    firsts = [first for first, _ in kept.layer_shards]
    is_whole = firsts == ends[:-1] and ends[-1] == num_layers and all(first < stop for first, stop in pairwise(ends))
    return kept if is_whole else None
