"""The command line."""

import gc
import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from pipeline.display.printing import show
from stages.contracts.errors import InputError
from stages.io.storage import failures, is_outside
from stages.registry import STAGES

if TYPE_CHECKING:
    from pipeline.commands.run import MakeExecutor
    from pipeline.display.progress import Reporter
    from pipeline.executors.base import Executor
    from stages.contracts.settings import Resources

app = typer.Typer(
    name="hcsmoe",
    help="Shrink a Mixture-of-Experts language model by merging similar experts, on a Ray cluster or on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


StageName = StrEnum("StageName", {name.upper(): name for name in STAGES})  # type: ignore[misc]  # from the registry


class ExecutorName(StrEnum):
    """Where units run."""

    RAY = "ray"
    LOCAL = "local"


class TableFormat(StrEnum):
    """How a comparison is written."""

    TABLE = "table"
    MARKDOWN = "markdown"
    JSON = "json"


RunFile = Annotated[Path, typer.Argument(help="Run file (YAML); see examples/tiny-mixtral.yaml.", metavar="RUN.yaml")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, for example clustering.linkage=single. Repeatable.")
]


Address = Annotated[
    str, typer.Option(help="Ray cluster: auto (the running one, else a new one here), local (a new one here), or ADDRESS.")
]
ExecutorOption = Annotated[ExecutorName, typer.Option(help="ray, or local: everything in this process.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check digests of all finished files, not only sizes.")]
RunDir = Annotated[str, typer.Argument(help="Run directory, or its URL.", metavar="RUN_DIR")]


def _output() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def _executor_maker(name: ExecutorName, address: str, resources: "Resources", reporter: "Reporter") -> "MakeExecutor":
    """Return a function that makes the executor. It is called after the input is checked, because connecting takes seconds."""

    def make() -> "Executor":
        if name is ExecutorName.LOCAL:
            from pipeline.executors.local import LocalExecutor

            gc.enable()
            return LocalExecutor()
        from pipeline.executors.ray import RayExecutor, connect

        gc.enable()

        reporter.line(connect(address))
        signal.signal(signal.SIGTERM, _on_terminate)  # connecting has installed Ray's own handler for SIGTERM
        return RayExecutor(resources)

    return make


@app.command()
def run(
    run_file: RunFile,
    settings: Settings = None,
    address: Address = "auto",
    executor: ExecutorOption = ExecutorName.RAY,
    from_stage: Annotated[StageName | None, typer.Option("--from", help="Redo this stage and what follows.")] = None,
    only: Annotated[StageName | None, typer.Option("--only", help="Run this stage and no other.")] = None,
    verify: Verify = False,
) -> None:
    """Run every stage that is not finished; the same command resumes."""
    from pipeline.commands.run import run as run_pipeline
    from pipeline.config import load_config
    from pipeline.display.comparison import Comparison
    from pipeline.display.progress import Reporter
    from pipeline.display.tables import certainty_lines, result_table, super_expert_lines
    from pipeline.display.task_table import TaskTable
    from pipeline.driver.run_state import RunOptions
    from pipeline.errors import RunFailed

    config = load_config(run_file, settings or [])
    reporter = Reporter(Console(stderr=True))

    options = RunOptions(verify, from_stage.value if from_stage else None, only.value if only else None)
    result = run_pipeline(config, _executor_maker(executor, address, config.resources, reporter), reporter, options)
    run_dir = result.report_path.parent
    console = _output()
    if result.report["models"]:
        show(console, result_table(result.report))
        if (scores := TaskTable.of(result.report)) is not None:
            show(console, scores.table())
        if config.variants is not None:
            first, *_ = Comparison.all_of(result.report)
            show(console, first.source_line)
            show(console, first.table())
        for line in (*super_expert_lines(result.report), *certainty_lines(result.report)):
            show(console, line)
        for warning in result.report["warnings"]:
            reporter.line(f"warning: {warning}")
        show(console, f"report       {result.report_path}")
        show(console, f"checkpoints  {run_dir / 'models'}")
    show(console, f"{result.num_run} units run, {result.num_reused} reused, {result.elapsed_s:.1f} s")
    if result.shortfalls:
        raise RunFailed("\n".join((*result.shortfalls, "all else is finished; the same command tries these again")))


@app.command()
def batch(
    batch_file: Annotated[Path, typer.Argument(help="Batch file (YAML): batch_dir and runs.", metavar="BATCH.yaml")],
    address: Address = "auto",
    executor: ExecutorOption = ExecutorName.RAY,
    verify: Verify = False,
) -> None:
    """Run many run files on one cluster; one run's failure does not stop the others."""
    from pipeline.commands.batch import load_batch, run_batch
    from pipeline.display.progress import Reporter
    from pipeline.driver.run_state import RunOptions

    config = load_batch(batch_file)
    errors = Console(stderr=True)
    make_executor = _executor_maker(executor, address, config.resources, Reporter(errors))
    result = run_batch(config, make_executor, errors, RunOptions(verify))
    show(_output(), result.table)
    show(_output(), f"summary  {result.path}")
    if result.num_failed:
        raise typer.Exit(1)


@app.command()
def clean(
    run_dir: RunDir,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only listed.")] = False,
) -> None:
    """List, and with --yes remove, what no setting of the last run uses."""
    from pipeline.commands.clean import describe_unused, remove_unused

    for line in remove_unused(run_dir) if yes else describe_unused(run_dir):
        show(_output(), line)


@app.command()
def plan(run_file: RunFile, settings: Settings = None) -> None:
    """Check a run file and print stages, units, memory and disk needed. Runs and writes nothing."""
    from pipeline.commands.plan import describe_plan
    from pipeline.config import load_config

    for item in describe_plan(load_config(run_file, settings or [])):
        show(_output(), item)


@app.command()
def compare(
    run_file: RunFile,
    settings: Settings = None,
    output_format: Annotated[TableFormat, typer.Option("--format", help="table, markdown or json.")] = TableFormat.TABLE,
) -> None:
    """Show a finished run's variants side by side: perplexity of every target and format, over all text and by domain; a star
    marks the best. Scores of tasks too, tasks across."""
    from pipeline.commands.compare import comparisons
    from pipeline.config import load_config

    found, scores = comparisons(load_config(run_file, settings or []))
    console = _output()
    if output_format is TableFormat.JSON:
        tasks = scores.values() if scores is not None else {}
        console.print_json(data={"comparisons": [one.values() for one in found], **tasks}, ensure_ascii=True)
        return
    for one in found:
        for line in (one.source_line, *one.super_lines):
            show(console, line)
        if output_format is TableFormat.TABLE:
            show(console, one.table())
        else:
            for line in ("", *one.markdown(), ""):
                show(console, line)
    if scores is None:
        return
    if output_format is TableFormat.TABLE:
        show(console, scores.table())
    else:
        for line in scores.markdown():
            show(console, line)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a model of the hub as org/name.", metavar="MODEL")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint is, whether it is supported and what merged versions would weigh, from its headers alone."""
    from pipeline.commands.inspect import describe_model, inspect_model

    facts = inspect_model(model, revision)
    if as_json:
        _output().print_json(data=facts, ensure_ascii=True)
        return
    for item in describe_model(facts):
        show(_output(), item)


@app.command()
def status(
    run_dir: RunDir,
) -> None:
    """Show how far a run is, from its files alone."""
    from pipeline.commands.status import describe_status

    for item in describe_status(run_dir):
        show(_output(), item)


def _on_terminate(signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted.

    A bug of this program prints its traceback, even when the bug raises an OSError.
    """
    from pipeline.errors import RunFailed

    signal.signal(signal.SIGTERM, _on_terminate)
    errors = Console(stderr=True)
    try:
        app()
    except InputError as e:
        show(errors, f"error: {e}")
        sys.exit(2)
    except RunFailed as e:
        show(errors, f"failed: {e}")
        sys.exit(1)
    except failures() as e:
        if not is_outside(e):
            raise
        reason = " ".join(str(e).split())
        show(errors, f"failed: {reason}; what was finished is kept: mend this and the same command continues from there")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
