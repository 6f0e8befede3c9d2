"""Targets by memory: the largest checkpoint whose weights fit beside the cache of keys and values."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from rich import filesize

from pipeline.imports import resolve
from pipeline.run.variants import variants_of
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.settings import RunConfig
from stages.contracts.survey import Survey
from stages.contracts.target_settings import AskedTarget, MemoryTarget, WidthTarget
from stages.contracts.targets import targets_of, with_targets
from stages.contracts.tensors import TensorRow, num_neurons
from stages.model.families import stock_targets
from stages.registry import stage_specs


@dataclass(frozen=True)
class Fit:
    """The largest target that fits. weights_bytes: of the largest checkpoint that it makes, over variants and formats."""

    asked: MemoryTarget
    target: int | WidthTarget
    weights_bytes: int
    cache_bytes: int

    @property
    def kept(self) -> str:
        """What is kept of a layer, in words."""
        if isinstance(self.target, int):
            return f"{self.target} experts a layer"
        return f"{self.target.experts} experts a layer, {self.target.width:.4g} of their neurons"

    def __str__(self) -> str:
        return (
            f"memory {filesize.decimal(self.asked.memory)}: {self.kept}, {filesize.decimal(self.weights_bytes)} of weights "
            f"beside {_cache_text(self.asked, self.cache_bytes)}"
        )


def _cache_text(asked: MemoryTarget, cache_bytes: int) -> str:
    return f"{filesize.decimal(cache_bytes)} of cache for {asked.batch} x {asked.context:,} tokens"


class Fitter:
    """Finds targets of one model. Loads torch, which knows the model's tensors and its cache.

    Raises InputError for a model that is not supported.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        surveyed = resolve("stages.model.survey:survey_checkpoint")(str(checkpoint.folder))
        self._survey, self._tensors = cast(tuple[Survey, Sequence[TensorRow]], surveyed)

    def largest(self, config: RunConfig, asked: MemoryTarget) -> Fit:
        """The largest target with which every variant and format of a run fits. Raises InputError if none does."""
        cache_bytes = cast(int, resolve("stages.model.kv_cache:kv_cache_bytes")(self._checkpoint, asked.context, asked.batch))
        candidates = list(self._candidates(config, asked))
        sizes: Callable[[int], int] = lambda place: self._weights_bytes(config, candidates[place])  # noqa: E731
        least = sizes(0)
        if least + cache_bytes > asked.memory:
            fewest = Fit(asked, candidates[0], least, cache_bytes)
            raise InputError(
                f"clustering.targets: memory is {filesize.decimal(asked.memory)}, but {fewest.kept}, the least, take "
                f"{filesize.decimal(least)} beside {_cache_text(asked, cache_bytes)}; use at least "
                f"{math.ceil((least + cache_bytes) / 10**6):,} MB, or a shorter context"
            )
        low, high = 0, len(candidates) - 1  # the candidate at low fits
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(config, candidates[middle], asked, cache_bytes) else (low, middle - 1)
        return Fit(asked, candidates[low], sizes(low), cache_bytes)

    def _fits(self, config: RunConfig, target: int | WidthTarget, asked: MemoryTarget, cache_bytes: int) -> bool:
        try:
            return self._weights_bytes(config, target) + cache_bytes <= asked.memory
        except InputError:  # a width that would be rounded up to all neurons
            return False

    def _candidates(self, config: RunConfig, asked: MemoryTarget) -> Iterator[int | WidthTarget]:
        """Targets, smallest first."""
        num_experts, variants = self._survey.num_experts, variants_of(config)
        if asked.keep == "width":
            total = num_neurons(self._tensors)
            multiple = math.lcm(*(variant.refit.width_multiple for variant in variants))
            for kept in range(multiple, total, multiple):
                yield WidthTarget(experts=num_experts, width=kept / total)
            yield num_experts
            return
        is_stock = any("stock" in one.export.formats for one in variants if not one.method.keeps_all)
        place = str(self._checkpoint.folder)
        yield from stock_targets(self._checkpoint.config, place) if is_stock else range(1, num_experts + 1)

    def _weights_bytes(self, config: RunConfig, target: AskedTarget) -> int:
        """Of the largest checkpoint that a run makes for a target."""
        asked = with_targets(config, [target])
        return max(
            sum(spec.weights_bytes(one, self._survey, self._tensors) for spec in stage_specs())
            for one in targets_of(asked.name, variants_of(asked))
        )


def with_fits(config: RunConfig, checkpoint: Checkpoint) -> tuple[RunConfig, tuple[Fit, ...]]:
    """The same run with the largest targets that fit in place of those by memory; and what was found.
    Raises InputError where nothing fits."""
    asked = config.clustering.num_experts
    if not any(isinstance(one, MemoryTarget) for one in asked):
        return config, ()
    fitter = Fitter(checkpoint)
    fits = {one: fitter.largest(config, one) for one in asked if isinstance(one, MemoryTarget)}
    targets = [fits[one].target if isinstance(one, MemoryTarget) else one for one in asked]
    return with_targets(config, targets), tuple(fits.values())
