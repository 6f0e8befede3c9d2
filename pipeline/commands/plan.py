"""`plan`: what a run would do and need, from config, headers and texts alone.
Starts no process and writes nothing to the run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from rich import filesize
from rich.table import Table

from pipeline.checks import check
from pipeline.display.printing import add_row
from pipeline.display.tables import experts_text
from pipeline.hub import headers_of
from pipeline.imports import resolve
from pipeline.run.view import RunView
from stages.contracts.settings import RunConfig, hub_dir
from stages.contracts.survey import Survey
from stages.contracts.tensors import TensorRow


def describe_plan(config: RunConfig) -> Iterator[Table | str]:
    """Lines and tables for the terminal. Only headers and small files of a hub model are downloaded, to a temporary folder.

    Raises InputError for every problem that would stop a run.
    """
    with headers_of(config.model, config.revision) as folder:
        yield from _describe(config, folder)


def _describe(config: RunConfig, folder: Path) -> Iterator[Table | str]:
    checked = check(config, folder)
    surveyed = resolve("stages.model.survey:survey_checkpoint")(str(checked.inputs.model))
    survey, tensors = cast(tuple[Survey, Sequence[TensorRow]], surveyed)
    view = RunView(config, checked.inputs, surveyed=(survey, tensors))
    for spec in view.specs:
        spec.check_surveyed(view)
    for spec in view.specs:
        for call in spec.rehearsals(view):
            resolve(call.function)(call.args)
    yield (
        f"{config.model}: {survey.architecture}, {survey.num_layers} layers ({len(survey.moe_layers)} MoE), "
        f"{survey.num_experts} experts, top-{survey.top_k}, {survey.num_parameters:,} parameters, "
        f"{filesize.decimal(survey.total_bytes)}, {survey.dtype}"
    )
    for spec in view.specs:
        yield from spec.remarks(view)
    plans = [(spec.name, spec.plan(view)) for spec in view.specs]
    written = 0
    targets = Table("target", "experts a layer", "files", "bytes", title=None)
    for _, plan in plans:
        for checkpoint in plan.checkpoints:
            experts = experts_text(checkpoint.num_experts, checkpoint.num_neurons)
            add_row(targets, (checkpoint.name, experts, checkpoint.num_files, filesize.decimal(checkpoint.num_bytes)))
            written += checkpoint.num_bytes
    yield targets
    units = Table("stage", "units", "runs on", title=None)
    for name, plan in plans:
        if plan.units:
            units.add_row(name, plan.units, plan.runs_on)
    yield units
    for _, plan in plans:
        yield from plan.lines
    for_a_time = filesize.decimal(sum(plan.disk_bytes for _, plan in plans))
    yield f"disk in {view.run_dir}: {filesize.decimal(written)} for checkpoints, meanwhile {for_a_time} for hidden states"
    for place, dataset in checked.datasets.items():
        if dataset.note:
            yield dataset.note
        yield f"disk in {hub_dir(config)}: {place}.data {dataset}; only a run downloads and reads them"
