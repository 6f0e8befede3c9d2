"""The stage cluster: how each layer's experts group."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.settings import RunConfig
from stages.contracts.spec import Preset, Run, StagePlan, StageSpec
from stages.contracts.targets import Target
from stages.contracts.units import Unit, UnitCall
from stages.model.families import num_experts_in


@dataclass(frozen=True)
class ClusterArgs:
    """A layer to be clustered. seed: of the halves of the data that are compared under sampling."""

    calibrate_dir: str
    layer: int
    feature: str
    distance: str
    linkage: str
    seed: int


@dataclass(frozen=True)
class ClusterFacts:
    """largest_distance: of the last merge of the dendrogram."""

    largest_distance: float


CLUSTER = UnitCall("stages.cluster.units:cluster_unit", ClusterArgs, ClusterFacts)


class Cluster(StageSpec):
    """Dendrogram and labels of every layer."""

    name = "cluster"
    version = 1
    libraries = ("numpy", "scipy")
    after = ("prepare", "calibrate")
    presets: ClassVar[Mapping[str, Preset]] = {
        "hc-smoe": {
            "clustering": {"feature": "expert_output", "distance": "euclidean", "linkage": "average"},
            "merging": {"method": "frequency"},
        },
    }
    """HC-SMoE (arXiv:2410.08589)."""

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Raise InputError for a target with more experts than there are."""
        num_experts = num_experts_in(checkpoint.config, str(checkpoint.folder))
        for target in targets:
            counts = (target.num_experts,) if isinstance(target.num_experts, int) else target.num_experts
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

    def parts(self, run: Run) -> Iterator[Part]:
        """One for each variant."""
        for variant in run.variants:
            settings = variant.clustering.model_dump(exclude={"num_experts"})
            yield run.new_part(self, variant.name, settings, {"calibrate": run.part("calibrate")})

    def units(self, run: Run) -> Iterator[Unit]:
        """One for each layer."""
        data = run.config.calibration
        for variant in run.variants:
            settings, label = variant.clustering, f"{variant.name}, " if variant.name else ""
            for layer in run.survey.moe_layers:
                args = ClusterArgs(
                    run.part("calibrate").dir, layer, settings.feature, settings.distance, settings.linkage, data.seed
                )  # fmt: skip
                yield run.unit(
                    run.part(self.name, variant.name), f"layer-{layer:04d}", CLUSTER.on(args), f"{label}layer {layer}"
                )

    def plan(self, run: Run) -> StagePlan:
        """A unit for each layer."""
        return StagePlan(f"{len(run.variants) * len(run.survey.moe_layers)} layers", "CPU")


SPEC = Cluster()
