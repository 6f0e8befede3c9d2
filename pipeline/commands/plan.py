"""`plan`: what a run would do and need, from config, headers and texts alone.
Starts no process and writes nothing to the run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import JsonValue, TypeAdapter
from rich import filesize
from rich.table import Table

from pipeline.checks import check
from pipeline.display.printing import add_row
from pipeline.display.tables import experts_text
from pipeline.hub import headers_of
from pipeline.imports import resolve
from pipeline.run.view import RunView
from stages.contracts.settings import RunConfig, hub_dir
from stages.contracts.spec import PlannedCheckpoint
from stages.contracts.survey import Survey
from stages.contracts.tensors import TensorRow


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run. units: how many, in words. runs_on: "CPU" or "workers"."""

    name: str
    units: str
    runs_on: str


@dataclass(frozen=True)
class RunPlan:
    """What a run would do and need. Sizes are in bytes.

    model: as the run file names it. architecture: transformers' class. num_experts: in each of num_moe_layers. num_bytes: of
    the model. checkpoints: that the run would write. stages: that have something to do. remarks: of the stages on the model.
    needs: of the stages, such as memory, a line each. checkpoint_bytes: of all checkpoints. temporary_bytes: of hidden states
    while the run goes on. datasets: lines on hub datasets, which only a run downloads.
    """

    model: str
    architecture: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    num_parameters: int
    num_bytes: int
    dtype: str
    checkpoints: tuple[PlannedCheckpoint, ...]
    stages: tuple[PlannedStage, ...]
    remarks: tuple[str, ...]
    needs: tuple[str, ...]
    run_dir: str
    checkpoint_bytes: int
    temporary_bytes: int
    datasets: tuple[str, ...]

    def values(self) -> dict[str, JsonValue]:
        """For JSON."""
        values: dict[str, JsonValue] = TypeAdapter(RunPlan).dump_python(self, mode="json")
        return values


def plan_run(config: RunConfig) -> RunPlan:
    """Plan a run. Only headers and small files of a hub model are downloaded, to a temporary folder.

    Raises InputError for every problem that would stop a run.
    """
    with headers_of(config.model, config.revision) as folder:
        return _plan(config, folder)


def _plan(config: RunConfig, folder: Path) -> RunPlan:
    checked = check(config, folder)
    surveyed = resolve("stages.model.survey:survey_checkpoint")(str(checked.inputs.model))
    survey, tensors = cast(tuple[Survey, Sequence[TensorRow]], surveyed)
    view = RunView(checked.config, checked.inputs, surveyed=(survey, tensors))
    for spec in view.specs:
        spec.check_surveyed(view)
    for spec in view.specs:
        for call in spec.rehearsals(view):
            resolve(call.function)(call.args)
    plans = [(spec.name, spec.plan(view)) for spec in view.specs]
    checkpoints = tuple(checkpoint for _, plan in plans for checkpoint in plan.checkpoints)
    datasets: list[str] = []
    for place, dataset in checked.datasets.items():
        datasets += [dataset.note] if dataset.note else []
        datasets.append(f"disk in {hub_dir(config)}: {place}.data {dataset}; only a run downloads and reads them")
    return RunPlan(
        model=config.model,
        architecture=survey.architecture,
        num_layers=survey.num_layers,
        num_moe_layers=len(survey.moe_layers),
        num_experts=survey.num_experts,
        top_k=survey.top_k,
        num_parameters=survey.num_parameters,
        num_bytes=survey.total_bytes,
        dtype=survey.dtype,
        checkpoints=checkpoints,
        stages=tuple(PlannedStage(name, plan.units, plan.runs_on) for name, plan in plans if plan.units),
        remarks=(*checked.remarks, *(line for spec in view.specs for line in spec.remarks(view))),
        needs=tuple(line for _, plan in plans for line in plan.lines),
        run_dir=str(view.run_dir),
        checkpoint_bytes=sum(checkpoint.num_bytes for checkpoint in checkpoints),
        temporary_bytes=sum(plan.disk_bytes for _, plan in plans),
        datasets=tuple(datasets),
    )


def describe_plan(config: RunConfig) -> Iterator[Table | str]:
    """Lines and tables for the terminal, of a run that is planned now. Raises InputError as `plan_run` does."""
    yield from shown_plan(plan_run(config))


def shown_plan(plan: RunPlan) -> Iterator[Table | str]:
    """Lines and tables for the terminal."""
    yield (
        f"{plan.model}: {plan.architecture}, {plan.num_layers} layers ({plan.num_moe_layers} MoE), "
        f"{plan.num_experts} experts, top-{plan.top_k}, {plan.num_parameters:,} parameters, "
        f"{filesize.decimal(plan.num_bytes)}, {plan.dtype}"
    )
    yield from plan.remarks
    targets = Table("target", "experts a layer", "files", "bytes", title=None)
    for one in plan.checkpoints:
        experts = experts_text(one.num_experts, one.num_neurons)
        add_row(targets, (one.name, experts, one.num_files, filesize.decimal(one.num_bytes)))
    yield targets
    units = Table("stage", "units", "runs on", title=None)
    for stage in plan.stages:
        units.add_row(stage.name, stage.units, stage.runs_on)
    yield units
    yield from plan.needs
    yield (
        f"disk in {plan.run_dir}: {filesize.decimal(plan.checkpoint_bytes)} for checkpoints, meanwhile "
        f"{filesize.decimal(plan.temporary_bytes)} for hidden states"
    )
    yield from plan.datasets
