"""What the units of calibrate take on a modelled cluster, and the least that any schedule of them could take.

Dimensions: T tokens, D hidden size, F intermediate size, E experts, k experts a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from stages.contracts.survey import Survey

STATISTICS_ITEMSIZE = 8
HIDDEN_ITEMSIZE = 2
VALUE_BYTES = 2
DOWN_PRODUCT_BYTES = VALUE_BYTES + 8 + 8
"""Memory traffic for a weight of W_down when the mean outputs of a layer are made: read, written and read as float64."""


@dataclass(frozen=True)
class Hardware:
    """What a worker and the storage can do; every rate is one that is reached, not a peak.

    compute_flops: operations a second of a GPU in bfloat16. memory_bytes_s: of its memory. gpu_memory_bytes: for
    `resources.worker_memory`. link_bytes_s: a GPU's share of its machine's network port, in each direction.
    storage_bytes_s: that the storage delivers to all workers together. place_bytes_s: from host memory to the GPU, of
    weights as bfloat16, conversion included. unit_s: what a unit costs beside its work, sending it
    and sealing it: 2.6 ms by bench/overhead.py on one machine with a disk of its own, as much again for a network.
    """

    compute_flops: float = 150e12
    memory_bytes_s: float = 1.5e12
    gpu_memory_bytes: int = 80 * 10**9
    link_bytes_s: float = 25e9 / 8
    storage_bytes_s: float = 200e9
    place_bytes_s: float = 20e9
    unit_s: float = 0.005

    def read_bytes_s(self, num_workers: int) -> float:
        """What each of num_workers can read when all read at once."""
        return min(self.link_bytes_s, self.storage_bytes_s / num_workers)


@dataclass(frozen=True)
class Model:
    """Dimensions of a model. attention_values: weights of a layer's attention. disk_bytes: of a layer's weight on disk."""

    name: str
    num_layers: int
    num_dense_layers: int
    hidden_size: int
    intermediate: int
    dense_intermediate: int
    num_experts: int
    top_k: int
    num_shared: int
    vocab_size: int
    attention_values: int
    attention_width: int
    disk_bytes: int
    family: str = "simulated"

    @property
    def expert_values(self) -> int:
        """Weights of one expert: W_gate, W_up, W_down."""
        return 3 * self.hidden_size * self.intermediate

    def is_moe(self, layer: int) -> bool:
        """Dense layers come first."""
        return layer >= self.num_dense_layers

    def layer_values(self, layer: int) -> int:
        """Weights of a layer."""
        if not self.is_moe(layer):
            return self.attention_values + 3 * self.hidden_size * self.dense_intermediate
        experts = (self.num_experts + self.num_shared) * self.expert_values
        return self.attention_values + experts + self.num_experts * self.hidden_size

    def token_flops(self, layer: int, sequence_length: int) -> float:
        """Operations for one token: W_gate and W_up of every expert, W_down of the routed ones (the mean identity)."""
        attention = 2 * self.attention_values + 4 * sequence_length * self.attention_width
        if not self.is_moe(layer):
            return attention + 6 * self.hidden_size * self.dense_intermediate
        product = 2 * self.hidden_size * self.intermediate
        return attention + product * (2 * self.num_experts + self.top_k + 3 * self.num_shared)

    def survey(self) -> Survey:
        """What the survey would find of it, as far as the units of calibrate depend on it."""
        moe_layers = tuple(layer for layer in range(self.num_layers) if self.is_moe(layer))
        expert_bytes = VALUE_BYTES * self.num_experts * self.expert_values
        return Survey(
            family="simulated",
            architecture="Simulated",
            num_layers=self.num_layers,
            moe_layers=moe_layers,
            routers={layer: f"model.layers.{layer}.gate" for layer in moe_layers},
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            vocab_size=self.vocab_size,
            max_positions=None,
            dtype="bfloat16",
            num_parameters=sum(map(self.layer_values, range(self.num_layers))),
            total_bytes=VALUE_BYTES * sum(map(self.layer_values, range(self.num_layers))),
            mtp_tensors=0,
            first_mtp_tensor=None,
            unloaded_tensors=0,
            first_unloaded_tensor=None,
            ignored_files=(),
            outside_bytes=2 * VALUE_BYTES * self.vocab_size * self.hidden_size,
            layer_bytes=(layer_bytes := tuple(VALUE_BYTES * self.layer_values(layer) for layer in range(self.num_layers))),
            layer_held_bytes=layer_bytes,
            layer_expert_bytes=tuple(expert_bytes * self.is_moe(layer) for layer in range(self.num_layers)),
        )


def _mla_values(hidden: int, heads: int, query_rank: int, key_rank: int, nope: int, rope: int, value: int) -> int:
    queries = hidden * query_rank + query_rank * heads * (nope + rope)
    keys = hidden * (key_rank + rope) + key_rank * heads * (nope + value)
    return queries + keys + heads * value * hidden


MIXTRAL = Model(
    "Mixtral-8x7B", 32, 0, 4096, 14336, 0, 8, 2, 0, 32000, 4096 * (2 * 4096 + 2 * 1024), 4096, disk_bytes=2, family="mixtral"
)
QWEN3_30B = Model(
    "Qwen3-30B-A3B", 48, 0, 2048, 768, 0, 128, 8, 0, 151936, 2048 * (2 * 4096 + 2 * 512), 4096, disk_bytes=2, family="qwen3_moe"
)
DEEPSEEK_V3 = Model(
    "DeepSeek-V3", 61, 3, 7168, 2048, 18432, 256, 8, 1, 129280, _mla_values(7168, 128, 1536, 512, 128, 64, 128), 128 * 160,
    disk_bytes=1, family="deepseek_v3",
)  # fmt: skip
MODELS = (MIXTRAL, DEEPSEEK_V3)
"""Models whose calibration is simulated. Dimensions of mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B and
deepseek-ai/DeepSeek-V3 (FP8 on disk) from their config.json."""


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a calibration on num_workers workers."""

    model: Model
    hardware: Hardware
    num_workers: int
    num_tokens: int
    sequence_length: int

    def read_s(self, first: int, stop: int) -> float:
        """Weights of a layer shard from storage to the host's memory."""
        values = sum(self.model.layer_values(layer) for layer in range(first, stop))
        is_end = first == 0 or stop == self.model.num_layers
        outside = self.model.survey().outside_bytes if is_end else 0
        return (self.model.disk_bytes * values + outside) / self.hardware.read_bytes_s(self.num_workers)

    def place_s(self, first: int, stop: int) -> float:
        """Weights of a layer shard from the host's memory to the GPU."""
        return sum(VALUE_BYTES * self.model.layer_values(n) for n in range(first, stop)) / self.hardware.place_bytes_s

    def compute_s(self, layer: int, num_tokens: int) -> float:
        """Forward and sums of some tokens."""
        return num_tokens * self.model.token_flops(layer, self.sequence_length) / self.hardware.compute_flops

    def mean_outputs_s(self, layer: int) -> float:
        """W_down with a layer's sums, in float64: memory traffic."""
        if not self.model.is_moe(layer):
            return 0.0
        values = self.model.num_experts * self.model.hidden_size * self.model.intermediate
        return DOWN_PRODUCT_BYTES * values / self.hardware.memory_bytes_s

    def hidden_s(self, num_tokens: int) -> float:
        """Hidden states of some tokens over the link, one way."""
        return num_tokens * self.model.hidden_size * HIDDEN_ITEMSIZE / self.hardware.link_bytes_s

    def partial_statistics_s(self) -> float:
        """Statistics of one layer over a token shard, over the link, one way."""
        values = self.model.num_experts * (self.model.intermediate + self.model.num_experts)
        return values * STATISTICS_ITEMSIZE / self.hardware.link_bytes_s

    def sum_s(self, layer: int, num_shards: int) -> float:
        """To load the statistics of all token shards, to apply W_down, to store the sums."""
        values = self.model.num_experts * (self.model.hidden_size + self.model.num_experts)
        stored = values * STATISTICS_ITEMSIZE / self.hardware.link_bytes_s
        return num_shards * self.partial_statistics_s() + self.mean_outputs_s(layer) + stored


def ideal_s(costs: Costs, micro_batch_tokens: int, most_layers: int) -> float:
    """Seconds of the ideal pipeline: the least over its number of workers n <= num_workers and its layers p of a layer shard,
    1 <= p <= most_layers (what memory has room for), of a bound that no schedule beats in which layer shards of p layers are
    each read once, by one worker, whole, before they compute - weights are what costs most to move.

    The bound is the larger of two:

    - reading: all weights at the rate of n workers, then one layer shard for all tokens;
    - work: n workers share the work evenly (computing, placing weights, storing and loading hidden states between layer
      shards), except that they can neither all start nor all end at once. The k-th worker to start has to open a layer shard
      that a first micro-batch reaches only through k others, each open by then, and as many hand-overs; and the k-th last
      to end leaves k to be passed: fill and drain of a pipeline of micro-batches (GPipe, arXiv:1811.06965, section 2.3).

    It knows neither token shards nor what a unit costs beside its work: those are what the pipeline loses.
    """
    return min(_bound_s(costs, micro_batch_tokens, layers) for layers in range(1, most_layers + 1))


def _bound_s(costs: Costs, micro_batch_tokens: int, layers_per_shard: int) -> float:
    num_layers = costs.model.num_layers
    cuts = [*range(0, num_layers, layers_per_shard), num_layers]
    shards = list(pairwise(cuts))
    all_tokens = [
        sum(costs.compute_s(n, costs.num_tokens) + costs.mean_outputs_s(n) for n in range(*shard)) for shard in shards
    ]
    hop_s = 2 * costs.hidden_s(micro_batch_tokens)
    one_batch = [sum(costs.compute_s(n, micro_batch_tokens) for n in range(*shard)) + hop_s for shard in shards]
    left = [0.0, *accumulate(reversed(one_batch))]
    starts = _starts_s([costs.read_s(*shard) + costs.place_s(*shard) for shard in shards], one_batch)
    placing = sorted((costs.place_s(*shard) for shard in shards), reverse=True)
    moving = (len(shards) - 1) * 2 * costs.hidden_s(costs.num_tokens)
    bounds = []
    for n in range(1, min(costs.num_workers, len(shards)) + 1):
        reading = costs.read_s(0, num_layers) / n + min(all_tokens)
        work = sum(all_tokens) + moving + sum(placing[n:])  # what a worker places first is placed before it starts
        bounds.append(max(reading, (work + sum(starts[:n]) + sum(left[:n])) / n))
    return min(bounds)


def _starts_s(opening: Sequence[float], one_batch: Sequence[float]) -> list[float]:
    """Earliest start of the k-th worker, whose first layer shard has at least k before it."""
    reached, starts = 0.0, []
    for opened, passing in zip(opening, one_batch, strict=True):
        starts.append(max(reached, opened))
        reached = starts[-1] + passing
    return list(accumulate(reversed(starts), min))[::-1]
