"""What `inspect` finds out about a checkpoint. Sizes in bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue


@dataclass(frozen=True)
class RouterFacts:
    """How tokens choose experts. score: softmax or sigmoid. num_groups: 1 for a router without groups."""

    score: str
    has_bias: bool
    num_groups: int
    num_chosen_groups: int


@dataclass(frozen=True)
class TargetSize:
    """Bytes of weights with so many experts a layer, in both formats. stock: None where it is not possible."""

    num_experts: int
    tied: int
    stock: int | None


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a cache of keys and values with room for so many sequences (batch) of so many tokens (context)."""

    context: int
    batch: int
    bytes: int


@dataclass(frozen=True)
class CardFit:
    """A card, or a machine of several, with its memory, and the most experts a layer whose weights fit beside the cache, in
    both formats. None: no number fits."""

    name: str
    bytes: int
    tied: int | None
    stock: int | None


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a supported model only. shared_experts: the config's fields about them. layout: how experts' tensors
    are stored. targets: for every number of experts, most first."""

    architecture: str
    num_layers: int
    moe_layers: Sequence[int]
    num_experts: int
    top_k: int
    shared_experts: Mapping[str, JsonValue]
    router: RouterFacts
    num_parameters: int
    dtype: str
    quantisation: str | None
    layout: str
    unloaded_tensors: int
    first_unloaded_tensor: str | None
    bytes_by_role: Mapping[str, int]
    targets: Sequence[TargetSize]
    cache: CacheSize
    cards: Sequence[CardFit]


@dataclass(frozen=True)
class CheckpointFacts:
    """What `inspect` finds. reason: why the checkpoint is not supported, None if it is. model: None if it is not supported."""

    family: str
    num_files: int
    total_bytes: int
    bytes_by_dtype: Mapping[str, int]
    ignored_files: Sequence[str]
    reason: str | None
    model: ModelFacts | None

    def values(self) -> dict[str, JsonValue]:
        """For JSON: one mapping, which has the facts of the model only if it is supported."""
        values = asdict(self)
        model = values.pop("model")
        return {**values, **(model or {})}
