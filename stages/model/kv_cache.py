"""Size of the cache of keys, values and states that a model keeps while it generates.

It is read off the cache that transformers fills in a forward without values, at one and at two tokens: what grows is per token,
up to the window of a layer with a sliding one; the rest is a state of fixed size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.model.adapter import build_meta_model
from stages.model.model_config import reads_config
from stages.model.trial import skip_experts


def kv_cache_bytes(checkpoint: Checkpoint, context: int, batch: int) -> int:
    """Bytes of the cache for `batch` sequences of `context` tokens, in the dtype that the model computes in.

    Raises InputError for a model that transformers keeps no cache for.
    """
    num_bytes = 0
    for (first, window), (second, _) in zip(_layers(checkpoint, 1), _layers(checkpoint, 2), strict=True):
        per_token, fixed = second - first, 2 * first - second
        num_bytes += fixed + per_token * min(context, window or context)
    return num_bytes * batch


def _layers(checkpoint: Checkpoint, num_tokens: int) -> list[tuple[int, int | None]]:
    """Bytes of each layer of the cache after one sequence of num_tokens, and the layer's window, if it has one."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        model = build_meta_model(checkpoint, device="cpu")
        skip_experts(model)
        with reads_config(checkpoint.folder, "run this model"):
            cache: Any = model(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64), use_cache=True).past_key_values
        if cache is None:
            raise InputError(
                f"{checkpoint.folder}: transformers keeps no cache for this model, so what fits cannot be "
                f"told; give a number of experts instead of memory"
            )
        sizes = [sum(one.numel() * one.element_size() for one in _values(vars(layer))) for layer in cache.layers]
        return [(size, getattr(layer, "sliding_window", None)) for size, layer in zip(sizes, cache.layers, strict=True)]


def _values(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors; whole numbers are counters, one for all sequences."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for one in inside:
        yield from _values(one)
