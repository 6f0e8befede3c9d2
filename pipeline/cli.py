"""The command line."""

import signal
import sys
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from pipeline.names import StageName
from stages.common.errors import InputError

app = typer.Typer(
    name="hcsmoe",
    help="Shrink a Mixture-of-Experts language model by merging similar experts, on a Ray cluster or on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ExecutorName(StrEnum):
    """Where units run."""

    RAY = "ray"
    LOCAL = "local"


RunFile = Annotated[Path, typer.Argument(help="Run file (YAML); see examples/tiny-mixtral.yaml.", metavar="RUN.yaml")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting, for example clustering.linkage=single. Repeatable.")
]


@app.command()
def run(
    run_file: RunFile,
    settings: Settings = None,
    address: Annotated[
        str, typer.Option(help="Ray cluster: auto (the running one, else a new one here), local (a new one here), or ADDRESS.")
    ] = "auto",
    executor: Annotated[ExecutorName, typer.Option(help="ray, or local: everything in this process.")] = ExecutorName.RAY,
    from_stage: Annotated[StageName | None, typer.Option("--from", help="Redo this stage and what follows.")] = None,
    only: Annotated[StageName | None, typer.Option("--only", help="Run this stage and no other.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Check digests of all finished files, not only sizes.")] = False,
) -> None:
    """Run every stage that is not finished; the same command resumes."""
    from pipeline.config import load_config
    from pipeline.executors.base import Executor
    from pipeline.progress import Reporter
    from pipeline.run_state import RunOptions
    from pipeline.runner import run as run_pipeline
    from pipeline.table import result_table

    config = load_config(run_file, settings or [])
    reporter = Reporter(Console(stderr=True))

    def make_executor() -> Executor:
        if executor is ExecutorName.LOCAL:
            from pipeline.executors.local import LocalExecutor

            return LocalExecutor()
        from pipeline.executors.ray import RayExecutor, connect

        reporter.line(connect(address))
        signal.signal(signal.SIGTERM, _on_terminate)  # connecting has put Ray's own handler there
        return RayExecutor(config.resources)

    options = RunOptions(verify, from_stage.value if from_stage else None, only.value if only else None)
    result = run_pipeline(config, make_executor, reporter, options)
    run_dir = result.report_path.parent
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(result_table(result.report))
    console.print(f"report       {result.report_path}", soft_wrap=True, highlight=False)
    console.print(f"checkpoints  {run_dir / 'models'}", soft_wrap=True, highlight=False)
    console.print(f"{result.num_run} units run, {result.num_reused} reused, {result.elapsed_s:.1f} s", highlight=False)


@app.command()
def plan(run_file: RunFile, settings: Settings = None) -> None:
    """Check a run file and print stages, units, memory and disk needed. Runs and writes nothing."""
    from pipeline.config import load_config
    from pipeline.planning import describe_plan

    for item in describe_plan(load_config(run_file, settings or [])):
        Console(width=None if sys.stdout.isatty() else 160).print(item, highlight=False)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or a model of the hub as org/name.", metavar="MODEL")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint is, whether it is supported and what merged versions would weigh, from its headers alone."""
    from pipeline.inspecting import describe_model, inspect_model

    facts = inspect_model(model, revision)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if as_json:
        console.print_json(data=facts)
        return
    for item in describe_model(facts):
        console.print(item, highlight=False, markup=False)


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN_DIR")],
) -> None:
    """Show how far a run is, from its files alone."""
    from pipeline.status import describe_status

    for item in describe_status(run_dir):
        Console(width=None if sys.stdout.isatty() else 160).print(item, highlight=False)


def _on_terminate(signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt(signal.Signals(signum).name)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    from pipeline.errors import RunFailed

    signal.signal(signal.SIGTERM, _on_terminate)
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        app()
    except InputError as e:
        errors.print(f"error: {e}")
        sys.exit(2)
    except RunFailed as e:
        errors.print(f"failed: {e}")
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted; what was finished is kept, and the same command continues from there")
        sys.exit(130)
