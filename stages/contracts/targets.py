"""Targets: the checkpoints that a run makes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.contracts.budget import BudgetKind
from stages.contracts.keys import key_of
from stages.contracts.method import Method
from stages.contracts.protection import REQUIRED
from stages.contracts.settings import Budget, Clustering, Export, Merging, Refit, RunConfig
from stages.contracts.survey import Survey
from stages.contracts.target_settings import AskedTarget, MemoryTarget, NumExperts, ShareTarget, WidthTarget


@dataclass(frozen=True)
class Variant:
    """One way from evidence to a checkpoint. name: empty if the run file lists no variants. kind: of its budget."""

    name: str
    method: Method[Any]
    clustering: Clustering
    kind: BudgetKind
    budget: Budget
    merging: Merging
    refit: Refit
    export: Export

    @property
    def requires(self) -> frozenset[str]:
        """Columns of evidence that it requires beyond the default ones: for its method, its merging, its budget and its
        protection."""
        own: frozenset[str] = self.method.requires(self.clustering)
        merging = self.merging.requires if self.method.reads_merging else frozenset[str]()
        return own | merging | self.kind.requires | REQUIRED[self.clustering.protect]


@dataclass(frozen=True)
class Target:
    """A checkpoint to be made.

    num_experts, width: as the run file asks for them; num_experts is the mean a layer where the budget of the variant gives
    layers different numbers. A method that keeps all experts takes num_experts as the parameters that it may keep: those of so
    many experts. name: name of its folder under `models/`. format: "tied" or "stock".
    """

    variant: Variant
    num_experts: NumExperts
    format: str
    name: str
    width: float = 1.0

    @property
    def label(self) -> str:
        """Name of the variant and number of experts: equal for both formats."""
        return _joined(self.variant.name, _target_label(self.num_experts, self.width))

    @property
    def part(self) -> str:
        """Name of the target's part in a stage."""
        return f"{self.label}-{self.format}"

    @property
    def merges_mtp(self) -> bool:
        """Whether layers that predict further tokens are to have as few experts as the others. A tied export never has such
        layers: nothing that loads it reads them."""
        return self.format == "stock" and self.variant.export.mtp == "merge"

    def kept_experts(self, num_experts: int) -> NumExperts:
        """Experts that layers of num_experts keep."""
        return num_experts if self.variant.method.keeps_all else self.num_experts

    def counts(self, survey: Survey) -> dict[int, int]:
        """Experts that each MoE layer keeps, by layer, as far as the run file says: `stages.contracts.spec.counts_of` knows
        what a budget has decided."""
        kept = self.kept_experts(survey.num_experts)
        if isinstance(kept, int):
            return dict.fromkeys(survey.moe_layers, kept)
        return dict(zip(survey.moe_layers, kept, strict=True))

    def share(self, num_experts: int) -> float:
        """Neurons that each expert keeps, as a share of those of an expert of the source, whose layers have num_experts."""
        if not self.variant.method.keeps_all:
            return self.width
        assert isinstance(self.num_experts, int), "cluster has refused a number for each layer"
        return self.width * self.num_experts / num_experts


def targets_of(name: str, variants: Sequence[Variant]) -> tuple[Target, ...]:
    """Every target of some variants, in order. name: model name with which the names of exports begin."""
    asked = [(variant, *_asked(entry)) for variant in variants for entry in variant.clustering.num_experts]
    return tuple(
        Target(
            variant, count, export_format, f"{name}-{_joined(variant.name, _target_label(count, width))}-{export_format}", width
        )
        for variant, count, width in asked
        for export_format in variant.export.formats
    )


def with_counts(config: RunConfig, num_experts: int) -> RunConfig:
    """The same run for a model whose layers have num_experts: shares in `clustering.num_experts` become numbers of experts."""
    asked = config.clustering.num_experts
    return with_targets(config, [_count_of(one.share, num_experts) if isinstance(one, ShareTarget) else one for one in asked])


def with_targets(config: RunConfig, targets: Iterable[AskedTarget]) -> RunConfig:
    """The same run with other targets."""
    clustering = config.clustering.model_copy(update={"num_experts": tuple(targets)})
    return config.model_copy(update={"clustering": clustering})


def _count_of(share: float, num_experts: int) -> int:
    """The nearest number of experts, at least one; halves are rounded up."""
    return max(1, math.floor(share * num_experts + 0.5))


def _asked(entry: AskedTarget) -> tuple[NumExperts, float]:
    """Experts and width of an element of `clustering.num_experts`."""
    assert not isinstance(entry, ShareTarget | MemoryTarget), "they become numbers before"
    return (entry.experts, entry.width) if isinstance(entry, WidthTarget) else (entry, 1.0)


def _joined(variant: str, label: str) -> str:
    return f"{variant}-{label}" if variant else label


def _target_label(num_experts: NumExperts, width: float) -> str:
    """`6e`; `8e-0.5w` for a width; or for one number per layer its mean and a short hash, `5.25e-1f3a`."""
    if isinstance(num_experts, int):
        return f"{num_experts}e" if width == 1 else f"{num_experts}e-{width:g}w"
    return f"{sum(num_experts) / len(num_experts):.2f}e-{key_of({'num_experts': list(num_experts)})[:4]}"
