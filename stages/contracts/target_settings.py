"""Targets as a run file asks for them: elements of `clustering.num_experts`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from stages.contracts.section import Bytes, Count, Section

NumExperts = int | tuple[int, ...]
"""Experts that each MoE layer keeps: one number for all layers, or one per layer."""


class WidthTarget(Section):
    """A target whose experts have fewer neurons than the source's."""

    experts: Count
    """Experts that each layer keeps."""
    width: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Neurons that each of them keeps, as a share of an expert's, rounded to `refit.width_multiple`."""


class ShareTarget(Section):
    """A target by the share of a layer's experts, for run files that fit models of any number of experts."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Experts that each layer keeps, as a share of the source's: the nearest whole number, and at least one."""


class MemoryTarget(Section):
    """A target by what a checkpoint may take in memory: the largest whose weights fit beside the cache of keys and values."""

    memory: Bytes
    """Memory for weights and cache, such as `48 GB`: of one GPU, or of all that share the model. What an engine needs beside
    them, often a tenth, is not in it."""
    context: Count = 8192
    """Tokens of a sequence that the cache has room for."""
    batch: Count = 1
    """Sequences that the cache has room for."""
    keep: Literal["experts", "width"] = "experts"
    """experts: so many experts of a layer as fit. width: all of them, with so many of their neurons as fit."""


AskedTarget = NumExperts | WidthTarget | ShareTarget | MemoryTarget
"""A target as it is after the checks."""


def _short(target: Any) -> Any:
    """A target of whole experts as its number."""
    return target.experts if isinstance(target, WidthTarget) and target.width == 1 else target


_NUMBER, _BY_LAYER, _WIDTH = "union-number", "union-layers", "union-width"
_SHARE, _MEMORY = "union-share", "union-memory"
"""Tags of the forms of a target. Validation errors state them among the keys that lead to a value."""


def _kind_of_target(value: Any) -> str:
    if isinstance(value, ShareTarget) or (isinstance(value, Mapping) and "share" in value):
        return _SHARE
    if isinstance(value, MemoryTarget) or (isinstance(value, Mapping) and "memory" in value):
        return _MEMORY
    if isinstance(value, Mapping | WidthTarget):
        return _WIDTH
    return _BY_LAYER if isinstance(value, list | tuple) else _NUMBER


TargetSetting = Annotated[
    Annotated[Count, Tag(_NUMBER)]
    | Annotated[tuple[Count, ...], Field(min_length=1), Tag(_BY_LAYER)]
    | Annotated[WidthTarget, Tag(_WIDTH)]
    | Annotated[ShareTarget, Tag(_SHARE)]
    | Annotated[MemoryTarget, Tag(_MEMORY)],
    Discriminator(_kind_of_target),
    AfterValidator(_short),
]
"""A target as a run file writes it."""
