"""The stage merge: the weight files of every target."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.quantised import SOURCE_DTYPE
from stages.checkpoint.schemes import FITTED
from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.settings import RunConfig
from stages.contracts.spec import PlannedCheckpoint, Run, StagePlan, StageSpec, counts_of, kept_width, narrowed_to, plans_of
from stages.contracts.survey import Survey
from stages.contracts.targets import Target
from stages.contracts.tensors import TensorRow
from stages.contracts.units import Unit, UnitCall
from stages.merge.layout import OutputFile, output_files
from stages.model.families import num_experts_in, stock_targets, top_k_in


@dataclass(frozen=True)
class MergeArgs:
    """One output file of a target.

    model: source folder. survey_dir, plan_dir: relative to the run directory. num_merged: experts that each MoE layer keeps.
    value_dtype: of `export.dtype`. mtp_plan_dir: plans of layers that predict further tokens, relative to the run directory;
    None where these are not merged. max_file_bytes: a larger file is split. file: its position. num_neurons: of an expert,
    where it keeps fewer than it has.
    """

    model: str
    survey_dir: str
    plan_dir: str
    num_experts: int
    num_merged: Mapping[int, int]
    format: str
    value_dtype: str
    mtp_plan_dir: str | None
    max_file_bytes: int
    num_threads: int
    file: int
    num_neurons: int | None = None


@dataclass(frozen=True)
class PackedAnew:
    """New experts of a layer that were packed in the scheme of a quantised source: the sum of their squared values, and the sum
    of what packing changed, squared."""

    layer: int
    squared_values: float
    squared_error: float


@dataclass(frozen=True)
class MergeFacts:
    """num_tensors: of the file. packed_anew: by layer; empty where nothing was."""

    num_tensors: int
    packed_anew: tuple[PackedAnew, ...] = ()


MERGE = UnitCall("stages.merge.units:merge_unit", MergeArgs, MergeFacts)


class Merge(StageSpec):
    """The weight files of every target."""

    name = "merge"
    version = 4
    libraries = ("compressed-tensors", "numpy", "torch")
    after = ("prepare", "cluster", "recombine", "mtp")

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Raise InputError for a stock target with fewer experts than the router picks, or one that does not divide into the
        groups of a group-limited router."""
        place = str(checkpoint.folder)
        top_k, possible = top_k_in(checkpoint.config, place), stock_targets(checkpoint.config, place)
        for target in targets:
            if target.format != "stock":
                continue
            kept = target.kept_experts(num_experts_in(checkpoint.config, place))
            fewest = kept if isinstance(kept, int) else min(kept)
            if fewest < top_k:
                raise InputError(
                    f"clustering.num_experts is {fewest} but the router picks top_k={top_k} experts per token, so a stock "
                    f"export needs at least {top_k}; raise it or set export.formats to [tied]"
                )
            if fewest not in possible:
                raise InputError(
                    f"clustering.num_experts is {fewest} but the router of {config.model} first picks groups of experts, which "
                    f"must stay equally large in a stock export; use one of {', '.join(map(str, possible))}, "
                    f"or set export.formats to [tied]"
                )

    def check_surveyed(self, run: Run) -> None:
        """Raise InputError for new experts in a scheme that cannot be written, and for widths that a scheme cannot have."""
        for target in run.targets:
            if narrowed_to(run, target) is not None:
                _files(run, target, target.counts(run.survey))  # refuses widths that a scheme cannot have
        fitted = sorted({row.scheme for row in run.tensors if row.scheme in FITTED and row.role in ("expert", "fused_expert")})
        for target in run.targets if fitted else ():
            variant, counts = target.variant, target.counts(run.survey)
            makes_new = variant.refit.mode != "none" or (
                variant.method.reads_merging and min(counts.values()) < run.survey.num_experts
            )
            if makes_new and variant.export.dtype == SOURCE_DTYPE:
                raise InputError(
                    f"{run.config.model} is quantised by {fitted[0]}, in which new experts cannot be written; choose a "
                    f"clustering.method that prunes (such as reap), without refit, or set export.dtype to bfloat16"
                )

    def parts(self, run: Run) -> Iterator[Part]:
        """One for each target."""
        for target in run.targets:
            export = target.variant.export
            settings: dict[str, JsonValue] = {"max_file_bytes": export.max_file_bytes, "dtype": export.dtype}
            upstream = {"model": run.part("prepare", "model"), "plans": plans_of(run, target)}
            if target.merges_mtp:
                upstream["mtp"] = run.part("mtp", target.part)
            yield run.new_part(self, target.part, settings, upstream)

    def units(self, run: Run) -> Iterator[Unit]:
        """One for each output file."""
        for target in run.targets:
            part, export = run.part(self.name, target.part), target.variant.export
            counts = counts_of(run, target)
            for number, file in enumerate(_files(run, target, counts)):
                args = MergeArgs(
                    model=str(run.model),
                    survey_dir=run.part("prepare", "model").dir,
                    plan_dir=plans_of(run, target).dir,
                    num_experts=run.survey.num_experts,
                    num_merged=counts,
                    format=target.format,
                    value_dtype=export.dtype,
                    mtp_plan_dir=run.part("mtp", target.part).dir if target.merges_mtp else None,
                    max_file_bytes=export.max_file_bytes,
                    num_threads=run.config.resources.num_cpus,
                    file=number,
                    num_neurons=narrowed_to(run, target),
                )
                label = f"{target.name}/{file.name}, {file.num_bytes:,} bytes"
                yield run.unit(part, file.name, MERGE.on(args), label, on_worker=True)

    def weights_bytes(self, target: Target, survey: Survey, tensors: Sequence[TensorRow]) -> int:
        """Of all files of the target."""
        return sum(file.num_bytes for file in _files_of(target, target.counts(survey), survey, tensors))

    def plan(self, run: Run) -> StagePlan:
        """A unit for each output file."""
        checkpoints = []
        for target in run.targets:
            files = _files(run, target, target.counts(run.survey))
            num_bytes = sum(file.num_bytes for file in files)
            kept = target.kept_experts(run.survey.num_experts)
            checkpoints.append(PlannedCheckpoint(target.name, kept, narrowed_to(run, target), len(files), num_bytes))
        return StagePlan(f"{sum(one.num_files for one in checkpoints)} files", "workers", checkpoints=checkpoints)


def _files(run: Run, target: Target, counts: Mapping[int, int]) -> list[OutputFile]:
    return _files_of(target, counts, run.survey, run.tensors)


def _files_of(target: Target, counts: Mapping[int, int], survey: Survey, tensors: Sequence[TensorRow]) -> list[OutputFile]:
    export = target.variant.export
    return output_files(
        tensors, survey.num_experts, counts, target.format, export.max_file_bytes, export.dtype, target.merges_mtp,
        kept_width(target, survey, tensors),
    )  # fmt: skip


SPEC = Merge()
