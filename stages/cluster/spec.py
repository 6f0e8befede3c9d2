"""The stage cluster: layer plans, which say what becomes of each layer's experts, and dendrograms where a method has them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue
from rich import filesize

from stages.checkpoint.folder import Checkpoint
from stages.cluster import registry
from stages.cluster.budgets.registry import budgets
from stages.cluster.neuron_memory import pair_bytes, zip_bytes
from stages.contracts.budget import BUDGET_UNIT, BudgetFacts, BudgetKinds
from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.method import Methods
from stages.contracts.protection import PROTECT_UNIT, ProtectFacts
from stages.contracts.settings import Merging, RunConfig
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.targets import Target, Variant
from stages.contracts.tensors import num_neurons
from stages.contracts.units import NoFacts, Unit, UnitCall
from stages.model.families import family_of, groups_in, num_experts_in, stock_targets


@dataclass(frozen=True)
class Mix:
    """How evidence on several domains becomes one. weights: of the domains, sum 1; None where each layer has its own
    (`max_min`)."""

    domains: tuple[str, ...]
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class DendrogramArgs:
    """A layer whose dendrogram is made.

    calibrate_dir: relative to the run directory. mix: of its domains; None if there are none. method: module that holds it.
    clustering: its settings. seed: of the halves of the data that are compared under sampling.
    """

    calibrate_dir: str
    mix: Mix | None
    layer: int
    method: str
    clustering: Mapping[str, JsonValue]
    seed: int


@dataclass(frozen=True)
class DendrogramFacts:
    """largest_distance: of the last merge of the dendrogram."""

    largest_distance: float


@dataclass(frozen=True)
class Planning:
    """What plans of a target's layers have in common.

    calibrate_dir: relative to the run directory. mix: of its domains; None if there are none. method: module that holds it.
    clustering: its settings. router: how a stock router's rows are combined; None for a tied export. model, survey_dir: the
    checkpoint folder, whose config says the groups of the router, and where the weights of neurons are read, if merging aligns
    by them. max_bytes: of the similarities of neurons.
    """

    calibrate_dir: str
    mix: Mix | None
    method: str
    clustering: Mapping[str, JsonValue]
    merging: Merging
    router: str | None
    model: str
    survey_dir: str
    max_bytes: int


@dataclass(frozen=True)
class PlanArgs:
    """A layer of a target that is planned. num_slots: experts that the layer keeps; None for what the budget has decided."""

    planning: Planning
    layer: int
    num_slots: int | None


@dataclass(frozen=True)
class PlanFacts:
    """unweighted_slots: merged experts whose members no token was sent to."""

    layer: int
    unweighted_slots: tuple[int, ...]


@dataclass(frozen=True)
class ProtectArgs:
    """layers: MoE layers, ascending."""

    calibrate_dir: str
    mix: Mix | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Bounds:
    """Numbers of experts that a layer may keep: from `least` on, multiples of `multiple_of`."""

    least: int
    multiple_of: int

    def choices(self, num_experts: int, least: int = 1) -> list[int]:
        """Those numbers up to num_experts and from a further least number on, ascending."""
        first = -(-max(self.least, least) // self.multiple_of) * self.multiple_of
        return list(range(first, num_experts + 1, self.multiple_of))


@dataclass(frozen=True)
class CostArgs:
    """A layer of a target for which numbers of experts are compared. kind: of the budget."""

    planning: Planning
    layer: int
    kind: str
    bounds: Bounds


@dataclass(frozen=True)
class BudgetArgs:
    """A target whose experts are distributed over layers. total: experts of all layers. place: names the target in messages."""

    layers: tuple[int, ...]
    total: int
    place: str


DENDROGRAM = UnitCall("stages.cluster.units:dendrogram_unit", DendrogramArgs, DendrogramFacts)
PLAN = UnitCall("stages.cluster.units:plan_unit", PlanArgs, PlanFacts)
PROTECT = UnitCall("stages.cluster.units:protect_unit", ProtectArgs, ProtectFacts)
COST = UnitCall("stages.cluster.units:cost_unit", CostArgs, NoFacts)
BUDGET = UnitCall("stages.cluster.units:budget_unit", BudgetArgs, BudgetFacts)


class Cluster(StageSpec):
    """Layer plans of every target; dendrogram and labels of every layer, where the method has them."""

    name = "cluster"
    version = 2
    libraries = ("numpy", "scipy")
    after = ("prepare", "calibrate")

    def methods(self) -> Methods:
        """All that are registered."""
        return registry.methods()

    def budgets(self) -> BudgetKinds:
        """All that there are."""
        return budgets()

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Raise InputError for a target with more experts than there are, or fewer than its budget allows, or with a number a
        layer where all are kept; for a family whose routing a method or budget cannot follow; and for weights of domains where
        there are none."""
        for target in targets:
            if target.variant.clustering.domain_weights != "uniform" and not config.calibration.domains:
                raise InputError(
                    f"clustering.domain_weights is {target.variant.clustering.domain_weights} but calibration.data has no "
                    f"domains; give it as a mapping of domains, or leave domain_weights out"
                )
        place = str(checkpoint.folder)
        num_experts = num_experts_in(checkpoint.config, place)
        for target in targets:
            counts = (target.num_experts,) if isinstance(target.num_experts, int) else target.num_experts
            if target.variant.method.keeps_all and not isinstance(target.num_experts, int):
                raise InputError(
                    f"clustering.num_experts has a number for each layer, but method {target.variant.method.name} keeps all "
                    f"experts, equally wide in all layers; give one number"
                )
            if max(counts) > num_experts:
                raise InputError(
                    f"clustering.num_experts is {max(counts)} but {config.model} has {num_experts} experts a layer; "
                    f"use at most {num_experts}"
                )
            _check_bounds(target, bounds_of(target.variant, checkpoint.config, place), counts, num_experts)
            _check_family(target.variant, checkpoint.config, place)
            _check_protection(target, checkpoint.config, place)

    def check_surveyed(self, run: Run) -> None:
        """Raise InputError for a target that lists a number of layers that the model does not have."""
        num_layers = len(run.survey.moe_layers)
        for target in run.targets:
            if isinstance(target.num_experts, tuple) and len(target.num_experts) != num_layers:
                raise InputError(
                    f"clustering.num_experts has a target with {len(target.num_experts)} numbers but {run.config.model} has "
                    f"{num_layers} MoE layers; give one number for each"
                )
        limit = run.config.resources.worker_memory
        for variant in run.variants:
            needed = _neuron_bytes(variant, run)
            if needed > limit:
                raise InputError(
                    f"merging of {variant.name or variant.method.name} compares the {num_neurons(run.tensors):,} neurons of "
                    f"two experts, which takes {needed:,} bytes, more than resources.worker_memory {limit:,}; raise it"
                )

    def parts(self, run: Run) -> Iterator[Part]:
        """One for each variant whose method has a dendrogram, and one for each target."""
        upstream = {"calibrate": run.part("calibrate")}
        for variant in run.variants:
            if variant.method.linkage is not None:
                yield run.new_part(self, variant.name, _settings(run, variant), upstream)
        for target in run.targets:
            counts = target.num_experts
            settings: dict[str, JsonValue] = {
                **_settings(run, target.variant),
                "num_experts": counts if isinstance(counts, int) else list(counts),
                "format": target.format,
            }
            settings |= _further_settings(target.variant)
            if target.variant.method.reads_merging:
                settings["merging"] = target.variant.merging.model_dump(mode="json")
            if target.format == "stock":
                settings["router"] = target.variant.export.planned_router
                if target.variant.method.reads_groups:
                    settings["groups"] = "of the router"
            yield run.new_part(self, target.part, settings, upstream)

    def units(self, run: Run) -> Iterator[Unit]:
        """One for each layer of each part."""
        calibrate_dir, modules = run.part("calibrate").dir, registry.modules()
        for variant in run.variants:
            if variant.method.linkage is None:
                continue
            label = f"{variant.name}, " if variant.name else ""
            for layer in run.survey.moe_layers:
                drawn = DendrogramArgs(
                    calibrate_dir, _mix(run, variant), layer, modules[variant.method.name],
                    variant.clustering.model_dump(mode="json"), run.config.calibration.seed,
                )  # fmt: skip
                part = run.part(self.name, variant.name)
                yield run.unit(part, f"layer-{layer:04d}", DENDROGRAM.on(drawn), f"{label}layer {layer}")
        for target in run.targets:
            yield from _target_units(run, target, calibrate_dir, modules[target.variant.method.name])

    def plan(self, run: Run) -> StagePlan:
        """A unit for each layer of each part, and more where layers are compared."""
        compared = [target for target in run.targets if target.variant.kind.costs is not None]
        num_layers = len(run.survey.moe_layers)
        units = f"{(len(run.parts(self.name)) + len(compared)) * num_layers} layers"
        num_single = len(compared) + sum(target.variant.clustering.protect != "none" for target in run.targets)
        lines = [
            f"budget of {target.part}: {target.variant.kind.name} decides each layer's number after calibration; files are "
            "counted as if all layers had the mean"
            for target in compared
        ]
        needed = max(_neuron_bytes(variant, run) for variant in run.variants)
        if needed:
            lines.append(f"memory of a layer whose neurons are matched: {filesize.decimal(needed)} for a pair of experts")
        if any(variant.merging.method == "zipit" for variant in run.variants):
            lines.append("  zipit: grows with the square of a cluster's experts; more than resources.worker_memory is refused")
        return StagePlan(f"{units} + {num_single} over all layers" if num_single else units, "CPU", lines)


def _neuron_bytes(variant: Variant, run: Run) -> int:
    """Memory in bytes for the similarities of two experts' neurons; 0 if neurons are not matched."""
    if not (variant.method.reads_merging and variant.merging.matches_neurons):
        return 0
    size = num_neurons(run.tensors)
    return zip_bytes(2, size) if variant.merging.method == "zipit" else pair_bytes(size)


def _settings(run: Run, variant: Variant) -> dict[str, JsonValue]:
    """What a dendrogram depends on."""
    excluded = {"num_experts", "protect", "domain_weights"}
    settings: dict[str, JsonValue] = variant.clustering.model_dump(mode="json", exclude=excluded)
    mix = _mix(run, variant)
    if mix is not None:
        weights: JsonValue = "max_min" if mix.weights is None else list(mix.weights)
        settings["domain_weights"] = weights
    return settings


def _mix(run: Run, variant: Variant) -> Mix | None:
    domains = run.config.calibration.data
    if not isinstance(domains, dict):
        return None
    match variant.clustering.domain_weights:
        case "max_min":
            return Mix(tuple(domains), None)
        case "given":
            total = math.fsum(domain.weight for domain in domains.values())
            return Mix(tuple(domains), tuple(domain.weight / total for domain in domains.values()))
        case "uniform":
            return Mix(tuple(domains), (1 / len(domains),) * len(domains))


def _further_settings(variant: Variant) -> dict[str, JsonValue]:
    """What a target's plans depend on beside its method, where that is anything."""
    found: dict[str, JsonValue] = {}
    if variant.clustering.protect != "none":
        found["protect"] = variant.clustering.protect
    if variant.kind.costs is not None:
        found["budget"] = variant.budget.model_dump(mode="json")
    return found


def bounds_of(variant: Variant, config: Mapping[str, Any], place: str) -> Bounds:
    """What a variant's budget may give a layer: where layers differ, at least what a stock router of the family would need, so
    that no layer has fewer experts than a token picks."""
    least = variant.budget.least or 1
    if variant.kind.costs is not None:
        least = max(least, stock_targets(config, place)[0])
    return Bounds(least, variant.budget.multiple_of)


def _check_bounds(target: Target, bounds: Bounds, counts: Sequence[int], num_experts: int) -> None:
    choices = bounds.choices(num_experts)
    differs = target.variant.kind.costs is not None
    for count in counts:
        if not choices or not choices[0] <= count <= choices[-1] or (not differs and count not in choices):
            allowed = f"use {choices[0]} to {choices[-1]}" if choices else "lower budget.least or budget.multiple_of"
            raise InputError(
                f"clustering.num_experts is {count}, but with budget.kind {target.variant.kind.name} a layer keeps at least "
                f"{bounds.least} experts, a multiple of {bounds.multiple_of}, of {num_experts}; {allowed}"
            )


def _check_family(variant: Variant, config: Mapping[str, Any], place: str) -> None:
    family = family_of(config, place)
    if variant.kind.adds_outputs and family.gates_input:
        raise InputError(
            f"{place}: budget.kind is {variant.kind.name}, but this family's gates multiply its experts' inputs, so that "
            "outputs of experts do not add up times their gates; set it to usage or heights"
        )
    if variant.method.predicts_routing:
        reason = "gates multiply its experts' inputs" if family.gates_input else family.rerouting
        reason = reason or ("the router first picks groups of experts" if groups_in(config, place) is not None else "")
        if reason:
            raise InputError(
                f"{place}: clustering.method is {variant.method.name}, which predicts what the router picks among fewer "
                f"experts, but in this family {reason}; choose another method, such as reap"
            )


def _check_protection(target: Target, config: Mapping[str, Any], place: str) -> None:
    """Raise InputError where slots have to stay in groups of the router, which a protected expert would make unequal."""
    method, clustering = target.variant.method, target.variant.clustering
    is_grouped = method.reads_groups and target.format == "stock" and groups_in(config, place) is not None
    if is_grouped and clustering.protect != "none" and not (method.keeps_protected or method.keeps_all):
        raise InputError(
            f"{place}: clustering.protect is {clustering.protect}, but method {method.name} keeps stock slots within groups of "
            f"the router, which a protected expert would make unequal; set protect to none, or export.formats to [tied]"
        )


def _target_units(run: Run, target: Target, calibrate_dir: str, module: str) -> Iterator[Unit]:
    """Of a target: its protected experts, what numbers of experts cost each layer, its budget, and its plans."""
    variant, part, layers = target.variant, run.part("cluster", target.part), tuple(run.survey.moe_layers)
    mix = _mix(run, variant)
    before: list[Unit] = []
    if variant.clustering.protect != "none":
        protect = PROTECT.on(ProtectArgs(calibrate_dir, mix, layers))
        before = [run.unit(part, PROTECT_UNIT, protect, f"{target.part}, super experts")]
        yield from before
    planning = Planning(
        calibrate_dir, mix, module, variant.clustering.model_dump(mode="json"), variant.merging,
        variant.export.planned_router if target.format == "stock" else None, str(run.model), run.part("prepare", "model").dir,
        run.config.resources.worker_memory,
    )  # fmt: skip
    counts: Mapping[int, int | None] = target.counts(run.survey)
    if variant.kind.costs is not None:
        bounds = bounds_of(variant, Checkpoint(run.model).config, str(run.model))
        costs = [
            run.unit(
                part, f"costs-{layer:04d}", COST.on(CostArgs(planning, layer, variant.kind.name, bounds)),
                f"{target.part}, layer {layer}, costs", after=before,
            )
            for layer in layers
        ]  # fmt: skip
        yield from costs
        assert isinstance(target.num_experts, int), target.name
        budget = BUDGET.on(BudgetArgs(layers, target.num_experts * len(layers), target.part))
        before = [run.unit(part, BUDGET_UNIT, budget, f"{target.part}, budget", after=costs)]
        yield from before
        counts = dict.fromkeys(layers)
    for layer, count in counts.items():
        plan = PLAN.on(PlanArgs(planning, layer, count))
        yield run.unit(part, f"layer-{layer:04d}", plan, f"{target.part}, layer {layer}", after=before)


SPEC = Cluster()
