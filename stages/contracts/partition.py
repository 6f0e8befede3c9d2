"""The cut of a model to layer shards: what a worker holds at once. It decides who computes, never what is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from stages.contracts.errors import InputError
from stages.contracts.settings import Calibration, Evaluation, Resources, TextData
from stages.contracts.survey import Survey
from stages.io.untrusted import read_small

LayerRange = tuple[int, int]

SHARDS_PER_WORKER = 4
"""Layer shards that each worker gets at least, where the layers suffice: while the first is read, and while the last is
computed, a worker does nothing else. Simulated clusters (bench/simulation.py) are the evidence."""
_CHUNK_BYTES = 1 << 28
"""The most that calibrate makes of first products at a time; on a CPU it is less."""
_FRAGMENTS = 8
"""Of memory that is taken and given back, an eighth more is counted: allocators keep pieces."""


def weight_bytes(survey: Survey, layers: LayerRange) -> int:
    """Bytes of weights of a layer shard; with embedding, norm and head at both ends of the model."""
    first, stop = layers
    outside = survey.outside_bytes if first == 0 or stop == survey.num_layers else 0
    return sum(survey.layer_bytes[first:stop]) + outside


def held_bytes(survey: Survey, layers: LayerRange, data: TextData) -> int:
    """Memory in bytes that a worker needs for a layer shard, beside a Python process with torch: the most of what calibrate and
    evaluate allocate.

    Weights count as loaded, and once more for the largest layer, which some families need while they are converted. Experts
    that calibrate maps on a CPU take less: their pages belong to the system's file cache.
    """
    first, stop = layers
    itemsize = survey.itemsize
    # a layer's input and output; at the end the input, all of it in one piece, and as the bytes of a file
    hidden = 3 * data.sequences_per_shard * data.sequence_length * survey.hidden_size * itemsize
    inside = max(_activation_bytes(survey, layer, data) for layer in range(first, stop))
    if stop == survey.num_layers and isinstance(data, Evaluation):
        # logits, their copy in float32 and the logarithms of its softmax; an allocator may not have given back the layers' yet
        inside += data.micro_batch * data.sequence_length * survey.vocab_size * (itemsize + 4 + 4)
    changing = hidden + inside + _sum_bytes(survey, layers, data)
    return weight_bytes(survey, layers) + max(survey.layer_bytes[first:stop]) + int(changing + changing // _FRAGMENTS)


def _activation_bytes(survey: Survey, layer: int, data: TextData) -> int:
    """What a micro-batch takes inside of a layer. Widths follow from bytes: a matrix [width, hidden size] makes `width` values
    of a token, so bytes over the hidden size are bytes a token."""
    num_tokens, hidden_size = data.micro_batch * data.sequence_length, survey.hidden_size
    expert_bytes = survey.layer_expert_bytes[layer]
    rest = (survey.layer_bytes[layer] - expert_bytes) // hidden_size + 2 * hidden_size * 4  # attention; norms in float32
    products = expert_bytes // survey.num_experts // hidden_size  # of one expert: gate, up, and what W_down meets
    # of a routed pair: products; what enters, and what leaves in the model's dtype and times its gate; five indices
    pair = products + hidden_size * (2 * survey.itemsize + 4) + 5 * 8 if expert_bytes else 0
    chunk = min(_CHUNK_BYTES, num_tokens * products)
    return num_tokens * (rest + survey.top_k * pair) + chunk


def _sum_bytes(survey: Survey, layers: LayerRange, data: TextData) -> int:
    """Sums of activations in float64: those of all layers of the shard at once, or those of all token shards of a layer."""
    sampling = data.sampling if isinstance(data, Calibration) else None
    values = max(survey.layer_expert_bytes) // (3 * survey.itemsize * survey.hidden_size)  # experts times intermediate size
    copies = max(layers[1] - layers[0], data.num_shards) + 2
    return 8 * values * (sampling.groups if sampling else 1) * copies


def layer_shards(
    survey: Survey, data: TextData, resources: Resources, num_workers: int, num_rounds: int = SHARDS_PER_WORKER
) -> list[LayerRange]:
    """Contiguous layer ranges: as many layers each as fit in `worker_memory`, never fewer than one, and no more than leave
    each of num_workers num_rounds shards."""
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
    """Layer shards as a stage keeps them, and the settings that they were made for."""

    asked: Mapping[str, JsonValue]
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
