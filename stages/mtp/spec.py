"""The stage mtp: plans of layers that predict further tokens (MTP), where a target keeps them with fewer experts.

transformers does not load such layers, so no calibration reaches their experts. They are compared by their weights alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.spec import Run, StagePlan, StageSpec, counts_of, narrowed_to, plans_of
from stages.contracts.targets import Target
from stages.contracts.tensors import mtp_layers
from stages.contracts.units import NoFacts, Unit, UnitCall


@dataclass(frozen=True)
class DistancesArgs:
    """An MTP layer whose experts are compared. model: source folder. survey_dir: relative to the run directory."""

    model: str
    survey_dir: str
    layer: int
    num_experts: int
    num_threads: int


@dataclass(frozen=True)
class FollowArgs:
    """An MTP layer of a target that is planned.

    model: source folder, whose config says the groups of the router. plan_dir, distances_dir: relative to the run directory.
    last: the MoE layer whose plan it follows.
    """

    model: str
    plan_dir: str
    distances_dir: str
    last: int
    layer: int


DISTANCES = UnitCall("stages.mtp.units:distances_unit", DistancesArgs, NoFacts)
FOLLOW = UnitCall("stages.mtp.units:follow_unit", FollowArgs, NoFacts)


class Mtp(StageSpec):
    """Layer plans of MTP layers, for every target that keeps them with fewer experts."""

    name = "mtp"
    version = 1
    libraries = ("compressed-tensors", "numpy", "scipy", "torch")
    after = ("prepare", "cluster", "recombine")

    def check_surveyed(self, run: Run) -> None:
        """Raise InputError for a checkpoint with MTP layers, if the run file refuses them, or if it asks for fewer of their
        experts and these are not like those of the last MoE layer."""
        survey = run.survey
        if survey.mtp_tensors and any(variant.export.mtp == "error" for variant in run.variants):
            raise InputError(
                f"{survey.first_mtp_tensor} (and {survey.mtp_tensors - 1} more) predicts further tokens (MTP), and export.mtp "
                f"is error; set it to drop to leave these layers out, or to merge"
            )
        if not any(target.merges_mtp for target in run.targets):
            return
        for row in run.tensors:
            if row.role != "mtp" or ".experts." not in row.name:
                continue
            if not row.like:
                raise InputError(
                    f"{run.config.model}: tensor {row.name} predicts further tokens (MTP) and is not like the experts of the "
                    f"last MoE layer, so it cannot follow its plan; set export.mtp to drop"
                )
            if row.expert_axis not in (None, 0):
                raise InputError(
                    f"{run.config.model}: tensor {row.name} predicts further tokens (MTP) and has its experts along axis "
                    f"{row.expert_axis}, where they cannot be compared; set export.mtp to drop"
                )

    def remarks(self, run: Run) -> Iterator[str]:
        """A line about MTP layers, if they get fewer experts."""
        if run.survey.mtp_tensors and any(target.merges_mtp for target in run.targets):
            yield "export.mtp is merge: layers for further tokens follow the last MoE layer; their drafts are not measured"

    def parts(self, run: Run) -> Iterator[Part]:
        """One of distances for all targets, and one of plans for each target that may keep MTP layers."""
        targets = [target for target in run.targets if target.merges_mtp]
        model = run.part("prepare", "model")
        if targets:
            distances = run.new_part(self, "", {}, {"model": model})
            yield distances
            for target in targets:
                yield run.new_part(self, target.part, {}, {"distances": distances, "plans": plans_of(run, target)})

    def units(self, run: Run) -> Iterator[Unit]:
        """For each MTP layer its distances, and its plan for each target that keeps fewer experts, all of them whole."""
        layers, targets = mtp_layers(run.tensors), _targets(run)
        if not (layers and targets):
            return
        distances, survey = run.part(self.name), run.survey
        threads, survey_dir = run.config.resources.num_cpus, run.part("prepare", "model").dir
        compared = {}
        for layer in layers:
            args = DistancesArgs(str(run.model), survey_dir, layer, survey.num_experts, threads)
            compared[layer] = run.unit(distances, f"layer-{layer:04d}", DISTANCES.on(args), f"layer {layer}, weights")
            yield compared[layer]
        for target in targets:
            part, last = run.part(self.name, target.part), max(survey.moe_layers)
            for layer in layers:
                follow = FOLLOW.on(FollowArgs(str(run.model), plans_of(run, target).dir, distances.dir, last, layer))
                label = f"{target.part}, layer {layer}"
                yield run.unit(part, f"layer-{layer:04d}", follow, label, after=[compared[layer]])

    def plan(self, run: Run) -> StagePlan:
        """A unit for each MTP layer, and one for each that a target keeps."""
        layers = mtp_layers(run.tensors)
        num_targets = sum(target.merges_mtp for target in run.targets)
        if not (layers and num_targets):
            return StagePlan("", "CPU")
        line = "layers for further tokens: their experts are compared by their weights; how well they draft is not measured"
        return StagePlan(f"{len(layers)} layers x (1 + {num_targets} targets)", "CPU", [line])


def _targets(run: Run) -> list[Target]:
    """Targets that have fewer experts in their MTP layers."""
    return [
        target
        for target in run.targets
        if target.merges_mtp
        and narrowed_to(run, target) is None
        and min(counts_of(run, target).values()) < run.survey.num_experts
    ]


SPEC = Mtp()
