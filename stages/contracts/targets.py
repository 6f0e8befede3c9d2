"""Targets: the checkpoints that a run makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stages.contracts.keys import key_of
from stages.contracts.method import Method
from stages.contracts.settings import Clustering, Export, Merging, Refit

NumExperts = int | tuple[int, ...]
"""Experts that each MoE layer keeps: one number for all layers, or one per layer."""


@dataclass(frozen=True)
class Variant:
    """One way from evidence to a checkpoint. name: empty if the run file lists no variants."""

    name: str
    method: Method[Any]
    clustering: Clustering
    merging: Merging
    refit: Refit
    export: Export

    @property
    def requires(self) -> frozenset[str]:
        """Columns of evidence that its method and its merging require beyond the default ones."""
        own: frozenset[str] = self.method.requires(self.clustering)
        return own | self.merging.requires if self.method.reads_merging else own


@dataclass(frozen=True)
class Target:
    """A checkpoint to be made. name: name of its folder under `models/`. format: "tied" or "stock"."""

    variant: Variant
    num_experts: NumExperts
    format: str
    name: str

    @property
    def label(self) -> str:
        """Name of the variant and number of experts: equal for both formats."""
        return _joined(self.variant.name, _count_label(self.num_experts))

    @property
    def part(self) -> str:
        """Name of the target's part in a stage."""
        return f"{self.label}-{self.format}"

    def counts(self, moe_layers: Sequence[int]) -> dict[int, int]:
        """Experts that each MoE layer keeps, by layer."""
        if isinstance(self.num_experts, int):
            return dict.fromkeys(moe_layers, self.num_experts)
        return dict(zip(moe_layers, self.num_experts, strict=True))


def targets_of(name: str, variants: Sequence[Variant]) -> tuple[Target, ...]:
    """Every target of some variants, in order. name: model name with which the names of exports begin."""
    return tuple(
        Target(variant, count, export_format, f"{name}-{_joined(variant.name, _count_label(count))}-{export_format}")
        for variant in variants
        for count in variant.clustering.num_experts
        for export_format in variant.export.formats
    )


def _joined(variant: str, label: str) -> str:
    return f"{variant}-{label}" if variant else label


def _count_label(num_experts: NumExperts) -> str:
    """`6e`; or for one number per layer its mean and a short hash, `5.25e-1f3a`."""
    if isinstance(num_experts, int):
        return f"{num_experts}e"
    return f"{sum(num_experts) / len(num_experts):.2f}e-{key_of({'num_experts': list(num_experts)})[:4]}"
