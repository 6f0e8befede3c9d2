"""The stage cluster: layer plans, which say what becomes of each layer's experts, and dendrograms where a method has them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue
from rich import filesize

from stages.checkpoint.folder import Checkpoint
from stages.cluster import registry
from stages.cluster.neuron_memory import pair_bytes, zip_bytes
from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.method import Methods
from stages.contracts.settings import Merging, RunConfig
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.targets import Target, Variant
from stages.contracts.tensors import num_neurons
from stages.contracts.units import Unit, UnitCall
from stages.model.families import num_experts_in


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
class PlanArgs:
    """A layer of a target that is planned.

    calibrate_dir: relative to the run directory. mix: of its domains; None if there are none. num_slots: experts that the layer
    keeps. method: module that holds it. clustering: its settings. router: how a stock router's rows are combined; None for a
    tied export. model, survey_dir: the checkpoint folder, whose config says the groups of the router, and where the weights of
    neurons are read, if merging aligns by them. max_bytes: of the similarities of neurons.
    """

    calibrate_dir: str
    mix: Mix | None
    layer: int
    num_slots: int
    method: str
    clustering: Mapping[str, JsonValue]
    merging: Merging
    router: str | None
    model: str
    survey_dir: str
    max_bytes: int


@dataclass(frozen=True)
class PlanFacts:
    """unweighted_slots: merged experts whose members no token was sent to."""

    layer: int
    unweighted_slots: tuple[int, ...]


DENDROGRAM = UnitCall("stages.cluster.units:dendrogram_unit", DendrogramArgs, DendrogramFacts)
PLAN = UnitCall("stages.cluster.units:plan_unit", PlanArgs, PlanFacts)


class Cluster(StageSpec):
    """Layer plans of every target; dendrogram and labels of every layer, where the method has them."""

    name = "cluster"
    version = 2
    libraries = ("numpy", "scipy")
    after = ("prepare", "calibrate")

    def methods(self) -> Methods:
        """All that are registered."""
        return registry.methods()

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Raise InputError for a target with more experts than there are, or with a number a layer where all are kept, and for
        weights of domains where there are none."""
        for target in targets:
            if target.variant.clustering.domain_weights != "uniform" and not config.calibration.domains:
                raise InputError(
                    f"clustering.domain_weights is {target.variant.clustering.domain_weights} but calibration.data has no "
                    f"domains; give it as a mapping of domains, or leave domain_weights out"
                )
        num_experts = num_experts_in(checkpoint.config, str(checkpoint.folder))
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
            clustering, export = target.variant.clustering, target.variant.export
            for layer, count in target.counts(run.survey).items():
                planned = PlanArgs(
                    calibrate_dir, _mix(run, target.variant), layer, count, modules[target.variant.method.name],
                    clustering.model_dump(mode="json"), target.variant.merging,
                    export.planned_router if target.format == "stock" else None, str(run.model),
                    run.part("prepare", "model").dir, run.config.resources.worker_memory,
                )  # fmt: skip
                part = run.part(self.name, target.part)
                yield run.unit(part, f"layer-{layer:04d}", PLAN.on(planned), f"{target.part}, layer {layer}")

    def plan(self, run: Run) -> StagePlan:
        """A unit for each layer of each part."""
        needed = max(_neuron_bytes(variant, run) for variant in run.variants)
        lines = (
            [f"memory of a layer whose neurons are matched: {filesize.decimal(needed)} for a pair of experts"] if needed else []
        )
        if any(variant.merging.method == "zipit" for variant in run.variants):
            lines.append("  zipit: grows with the square of a cluster's experts; more than resources.worker_memory is refused")
        return StagePlan(f"{len(run.parts(self.name)) * len(run.survey.moe_layers)} layers", "CPU", lines)


def _neuron_bytes(variant: Variant, run: Run) -> int:
    """Memory in bytes for the similarities of two experts' neurons; 0 if neurons are not matched."""
    if not (variant.method.reads_merging and variant.merging.matches_neurons):
        return 0
    size = num_neurons(run.tensors)
    return zip_bytes(2, size) if variant.merging.method == "zipit" else pair_bytes(size)


def _settings(run: Run, variant: Variant) -> dict[str, JsonValue]:
    """What a dendrogram depends on."""
    settings: dict[str, JsonValue] = variant.clustering.model_dump(mode="json", exclude={"num_experts", "domain_weights"})
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


SPEC = Cluster()
