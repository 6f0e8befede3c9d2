"""Variants of a run: the ways from evidence to checkpoints that a run file lists, with their presets resolved."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.display.problems import problems
from stages.contracts.errors import InputError
from stages.contracts.settings import Clustering, Export, Merging, RunConfig, Section, VariantEntry, check_target_formats
from stages.contracts.spec import Preset
from stages.contracts.targets import Variant
from stages.registry import stage_specs

S = TypeVar("S", bound=Section)


def variants_of(config: RunConfig) -> tuple[Variant, ...]:
    """The variants; one without a name where the run file lists none. Raises InputError, naming the variant, for an unknown
    preset, two equal names, and settings that cannot be."""
    if config.variants is None:
        return (Variant("", config.clustering, config.merging, config.export),)
    (name, count), *_ = Counter(entry.name for entry in config.variants).most_common(1)
    if count > 1:
        raise InputError(f"variants: {count} are named {name}; give each its own name")
    return tuple(_resolved(config, entry) for entry in config.variants)


def presets() -> dict[str, Preset]:
    """All presets, by name."""
    return {name: preset for spec in stage_specs() for name, preset in spec.presets.items()}


def _resolved(config: RunConfig, entry: VariantEntry) -> Variant:
    place = f"variants: {entry.name}"
    known = presets()
    if entry.preset is not None and entry.preset not in known:
        raise InputError(f"{place}: there is no preset named {entry.preset}; known presets: {', '.join(sorted(known))}")
    preset = known[entry.preset] if entry.preset is not None else {}
    if "num_experts" in entry.clustering:
        raise InputError(f"{place}: clustering.num_experts holds for all variants; set it in the section clustering")
    counts = {"num_experts": config.clustering.num_experts}
    clustering = _section(Clustering, counts, preset.get("clustering", {}), entry.clustering, f"{place}: clustering")
    merging = _section(Merging, {}, preset.get("merging", {}), entry.merging, f"{place}: merging")
    export = _section(Export, config.export.model_dump(), preset.get("export", {}), entry.export, f"{place}: export")
    try:
        check_target_formats(clustering.num_experts, export.formats)
    except ValueError as e:
        raise InputError(f"{place}: {e}") from e
    return Variant(entry.name, clustering, merging, export)


def _section(kind: type[S], shared: Mapping[str, Any], preset: Mapping[str, Any], own: Mapping[str, Any], place: str) -> S:
    try:
        return kind.model_validate({**shared, **preset, **own})
    except ValidationError as e:
        raise InputError(f"{place}.{problems(e)}") from e
