"""Variants of a run, with their methods and presets resolved. A variant is one way from the evidence to checkpoints."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from pipeline.display.problems import problems
from stages.contracts.budget import BudgetKind, BudgetKinds
from stages.contracts.errors import InputError
from stages.contracts.method import Method, Methods, Preset
from stages.contracts.section import Section
from stages.contracts.settings import (
    Budget,
    Clustering,
    Export,
    Merging,
    Refit,
    RunConfig,
    VariantEntry,
    check_target_formats,
)
from stages.contracts.target_settings import WidthTarget
from stages.contracts.targets import Variant
from stages.registry import stage_specs

S = TypeVar("S", bound=Section)


def methods() -> Methods:
    """All methods of all stages, by name."""
    return {name: method for spec in stage_specs() for name, method in spec.methods().items()}


def budgets() -> BudgetKinds:
    """All kinds of budgets of all stages, by name."""
    return {name: kind for spec in stage_specs() for name, kind in spec.budgets().items()}


def presets() -> dict[str, Preset]:
    """All presets, by name. Each preset chooses a method."""
    return {
        name: {**preset, "clustering": {"method": method.name, **preset.get("clustering", {})}}
        for method in methods().values()
        for name, preset in method.presets.items()
    }


def method_of(clustering: object, place: str) -> Method[Any]:
    """The method that a section `clustering` chooses. Raises InputError, naming the place, for an unknown method."""
    default = Clustering.model_fields["method"].default
    name = clustering.get("method", default) if isinstance(clustering, Mapping) else default
    if not isinstance(name, str) or name not in methods():
        raise InputError(f"{place}.method: there is no method named {name!r}; known methods: {', '.join(sorted(methods()))}")
    return methods()[name]


def variants_of(config: RunConfig) -> tuple[Variant, ...]:
    """The variants of a run; a single one without a name if the run file lists none.

    Raises InputError, naming the variant, for an unknown preset or method, two equal names, invalid settings, and sections that
    a method does not read.
    """
    if config.variants is None:
        method = methods()[config.clustering.method]
        kind = _kind_of(config.budget, method, config.clustering, config.export, "")
        variant = Variant("", method, config.clustering, kind, config.budget, config.merging, config.refit, config.export)
        _check_fits(variant, "merging" in config.model_fields_set, "")
        return (variant,)
    (name, count), *_ = Counter(entry.name for entry in config.variants).most_common(1)
    if count > 1:
        raise InputError(f"variants: {count} are named {name}; give each its own name")
    return tuple(_resolved(config, entry) for entry in config.variants)


def _resolved(config: RunConfig, entry: VariantEntry) -> Variant:
    place = f"variants: {entry.name}"
    known = presets()
    if entry.preset is not None and entry.preset not in known:
        raise InputError(f"{place}: there is no preset named {entry.preset}; known presets: {', '.join(sorted(known))}")
    preset = known[entry.preset] if entry.preset is not None else {}
    for name in ("num_experts", "targets"):
        if name in entry.clustering:
            raise InputError(f"{place}: clustering.{name} holds for all variants; set it in the section clustering")
    chosen = {**preset.get("clustering", {}), **entry.clustering}
    method = method_of(chosen, f"{place}: clustering")
    counts = {"num_experts": config.clustering.num_experts}
    clustering = _section(method.settings, {**counts, **chosen}, f"{place}: clustering")
    given = {**preset.get("merging", {}), **entry.merging}
    merging = _section(Merging, given, f"{place}: merging")
    refit = _section(Refit, {**preset.get("refit", {}), **entry.refit}, f"{place}: refit")
    exported = {**config.export.model_dump(), **preset.get("export", {}), **entry.export}
    export = _section(Export, exported, f"{place}: export")
    budget = _section(Budget, {**preset.get("budget", {}), **entry.budget}, f"{place}: budget")
    kind = _kind_of(budget, method, clustering, export, f"{place}: ")
    variant = Variant(entry.name, method, clustering, kind, budget, merging, refit, export)
    _check_fits(variant, bool(given), f"{place}: ")
    try:
        check_target_formats(clustering.num_experts, export.formats)
    except ValueError as e:
        raise InputError(f"{place}: {e}") from e
    return variant


def _kind_of(budget: Budget, method: Method[Any], clustering: Clustering, export: Export, at: str) -> BudgetKind:
    """The kind of a budget. Raises InputError for an unknown one, and for a method, targets or formats that do not go with it.

    at: names the variant in the message, if there is one.
    """
    known = budgets()
    if budget.kind not in known:
        raise InputError(f"{at}budget.kind: there is no budget named {budget.kind!r}; known: {', '.join(sorted(known))}")
    kind = known[budget.kind]
    if kind.costs is None:
        return kind
    if method.keeps_all:
        raise InputError(
            f"{at}budget.kind is {kind.name}, but method {method.name} keeps all experts of every layer; set budget.kind to "
            "uniform"
        )
    if any(isinstance(count, tuple) for count in clustering.num_experts):
        raise InputError(
            f"{at}budget.kind is {kind.name}, but clustering.num_experts lists a number for each layer; give their mean alone, "
            "or set budget.kind to uniform"
        )
    if "tied" not in method.formats:
        raise InputError(
            f"{at}budget.kind is {kind.name}, which gives layers different numbers of experts, but what method {method.name} "
            "drops only a stock export can express, which has one number for all layers; set budget.kind to uniform"
        )
    if "stock" in export.formats:
        raise InputError(
            f"{at}budget.kind is {kind.name}, which gives layers different numbers of experts, but a stock export is the "
            "source's own architecture, whose config has one number for all layers; set export.formats to [tied]"
        )
    if kind.needs_linkage and method.linkage is None:
        having = sorted(name for name, one in methods().items() if one.linkage is not None)
        raise InputError(
            f"{at}budget.kind is {kind.name}, but method {method.name} has no dendrogram; choose {', '.join(having)}, or "
            "another budget"
        )
    return kind


def _check_fits(variant: Variant, has_merging: bool, at: str) -> None:
    """Raise InputError for settings that a method does not support. at: names the variant in the message, if there is one."""
    method, refit, export = variant.method, variant.refit, variant.export
    if has_merging and not method.reads_merging:
        raise InputError(f"{at}merging is set, but method {method.name} does not read that section; leave it out")
    needs_choice = method.needs_choice or any(isinstance(target, WidthTarget) for target in variant.clustering.num_experts)
    if needs_choice and refit.neurons != "choose":
        asked = f"method {method.name} keeps" if method.needs_choice else "clustering.targets has a width: experts keep"
        raise InputError(f"{at}{asked} some of its experts' neurons; set refit to {{mode: sequential, neurons: choose}}")
    if refit.neurons == "choose" and not (method.reads_merging or needs_choice):
        raise InputError(
            f"{at}refit.neurons is choose, but method {method.name} keeps single experts, whose neurons all have room; leave "
            "it out"
        )
    if refit.neurons == "choose" and variant.merging.matches_neurons:
        raise InputError(
            f"{at}merging aligns neurons, but refit.neurons is choose: whole neurons are kept as they are; leave one of "
            "them out"
        )
    if export.router == "fitted" and refit.mode == "none":
        raise InputError(f"{at}export.router is fitted, but nothing is refitted; set refit.mode to sequential")
    for name in export.formats:
        if name not in method.formats:
            raise InputError(
                f"{at}export.formats lists {name}, which cannot express what method {method.name} makes; set it to "
                f"[{', '.join(method.formats)}]"
            )


def _section(kind: type[S], values: Mapping[str, Any], place: str) -> S:
    try:
        return kind.model_validate(values)
    except ValidationError as e:
        raise InputError(f"{place}.{problems(e)}") from e
