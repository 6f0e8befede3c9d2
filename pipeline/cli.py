"""The command line."""

import gc
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.display.printing import show
from pipeline.driver.interrupts import handle_signals, watch_signals
from pipeline.errors import BAD_INPUT, EXIT_CODES, FAILED, INTERRUPTED, RunFailed
from pipeline.options import (
    Address,
    AsJson,
    Batch,
    Context,
    ExecutorName,
    ExecutorOption,
    GgufType,
    LogLevel,
    LogLevelOption,
    Model,
    Quiet,
    Revision,
    RunDir,
    RunFile,
    Settings,
    StageName,
    TableFormat,
    Verify,
)
from stages.contracts.errors import InputError
from stages.io.storage import failures, is_outside
from stages.registry import RECOMMENDED

if TYPE_CHECKING:
    from pipeline.commands.run import MakeExecutor
    from pipeline.display.progress import Reporter
    from pipeline.driver.run_state import RunOptions
    from pipeline.executors.base import Executor
    from stages.contracts.settings import Resources, RunConfig

app = typer.Typer(
    name="hcsmoe",
    help="Shrink a Mixture-of-Experts language model by merging similar experts, on a Ray cluster or on this machine.",
    epilog="Exit codes: "
    + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    + ". NO_COLOR=1 switches colours off.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _output() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def _show_all(items: Iterable[object]) -> None:
    console = _output()
    for item in items:
        show(console, item)


def _print_json(values: object) -> None:
    _output().print_json(data=values, ensure_ascii=True)


def _level_setting(level: LogLevel | None) -> list[str]:
    return [f"resources.log_level={level.value}"] if level is not None else []


def _presets() -> list[str]:
    from pipeline.run.variants import presets

    return sorted(presets())


def _executor_maker(name: ExecutorName, address: str, resources: "Resources", reporter: "Reporter") -> "MakeExecutor":
    """Return a function that makes the executor. It is called after the input is checked, because connecting takes seconds."""

    def make() -> "Executor":
        from pipeline.executors.choice import make_executor

        executor = make_executor(None if name is ExecutorName.LOCAL else address, resources, reporter.line)
        gc.enable()
        handle_signals()  # connecting has installed Ray's own handler for SIGTERM
        return executor

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
    as_json: AsJson = False,
    quiet: Quiet = False,
    log_level: LogLevelOption = None,
) -> None:
    """Run every stage that is not finished; the same command resumes."""
    from pipeline.config import load_config
    from pipeline.driver.run_state import RunOptions

    config = load_config(run_file, [*(settings or []), *_level_setting(log_level)])
    options = RunOptions(verify, from_stage.value if from_stage else None, only.value if only else None, _command_line())
    _run_and_show(config, options, executor, address, as_json, quiet)


@app.command()
def demo(
    run_dir: Annotated[str, typer.Option(help="Folder for everything that it writes.")] = "runs/demo",
    settings: Settings = None,
    address: Address = "local",
    executor: ExecutorOption = ExecutorName.RAY,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make the example model smaller by several methods and compare them; a minute or two on two cores."""
    from pipeline.commands.demo import demo_config
    from pipeline.driver.run_state import RunOptions

    config = demo_config(run_dir, settings or [])
    _run_and_show(config, RunOptions(command=_command_line()), executor, address, as_json, quiet)


def _command_line() -> str:
    return shlex.join(["hcsmoe", *sys.argv[1:]])


def _run_and_show(
    config: "RunConfig", options: "RunOptions", executor: ExecutorName, address: str, as_json: bool, quiet: bool
) -> None:
    """Run a run file and print what came out."""
    from pipeline.commands.run import run as run_pipeline
    from pipeline.display.outcome import result_values, shown_result
    from pipeline.display.progress import Reporter

    reporter = Reporter(Console(stderr=True, quiet=quiet))
    result = run_pipeline(config, _executor_maker(executor, address, config.resources, reporter), reporter, options)
    if as_json:
        _print_json(result_values(result))
    else:
        for warning in result.report["warnings"]:
            reporter.line(f"warning: {warning}")
        _show_all(shown_result(result, config.variants is not None))
    if result.shortfalls:
        raise RunFailed("\n".join((*result.shortfalls, "all else is finished; try these again by the same command")))


@app.command()
def batch(
    batch_file: Annotated[Path, typer.Argument(help="Batch file (YAML): batch_dir and runs.", metavar="BATCH.yaml")],
    address: Address = "auto",
    executor: ExecutorOption = ExecutorName.RAY,
    verify: Verify = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    log_level: LogLevelOption = None,
) -> None:
    """Run many run files on one cluster; one run's failure does not stop the others."""
    from pipeline.commands.batch import load_batch, run_batch
    from pipeline.display.progress import Reporter
    from pipeline.driver.run_state import RunOptions

    config = load_batch(batch_file)
    if log_level is not None:
        resources = config.resources.model_copy(update={"log_level": log_level.value})
        config = config.model_copy(update={"resources": resources})
    errors = Console(stderr=True, quiet=quiet)
    make_executor = _executor_maker(executor, address, config.resources, Reporter(errors))
    result = run_batch(config, make_executor, errors, RunOptions(verify))
    if as_json:
        _print_json({"runs": list(result.records)})
    else:
        show(_output(), result.table)
        show(_output(), f"summary  {result.path}")
    if result.num_failed:
        raise typer.Exit(FAILED)


@app.command()
def clean(
    run_dir: RunDir,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are only listed.")] = False,
) -> None:
    """List, and with --yes remove, what no setting of the last run uses."""
    from pipeline.commands.clean import describe_unused, remove_unused

    _show_all(remove_unused(run_dir) if yes else describe_unused(run_dir))


@app.command()
def init(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run file to write.")] = Path("run.yaml"),
    data: Annotated[list[str] | None, typer.Option(help="Calibration text: a file, or a hub dataset. Repeatable.")] = None,
    evaluation: Annotated[list[str] | None, typer.Option(help="Held-out text for perplexity. Repeatable.")] = None,
    method: Annotated[str, typer.Option(help="Preset.", autocompletion=_presets)] = RECOMMENDED,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run file if it exists.")] = False,
) -> None:
    """Write a commented run file that fits a model and the Ray cluster or machine that is found here."""
    from pipeline.commands.init import init as write
    from pipeline.machine import find_machines

    _show_all(write(model, revision, output, data or [], evaluation or [], method, find_machines(), force))


@app.command()
def plan(
    run_file: Annotated[
        Path, typer.Argument(help="Run file (YAML); with --memory a model, as of inspect.", metavar="RUN.yaml")
    ],
    settings: Settings = None,
    memory: Annotated[str | None, typer.Option(help="Print what of a MODEL fits into so much memory, such as 48GB.")] = None,
    context: Context = 8192,
    batch: Batch = 1,
    revision: Revision = None,
    as_json: AsJson = False,
) -> None:
    """Check a run file and print stages, units, memory and disk needed. Runs and writes nothing.

    With --memory: the largest number of experts, or width of all, whose weights fit beside a cache of keys and values.
    """
    if memory is not None:
        from pipeline.commands.fits import fit_values, fits_of, shown_fits

        found = fits_of(str(run_file), revision, memory, context, batch)
        if as_json:
            _print_json({"ways": fit_values(found)})
            return
        _show_all(shown_fits(found))
        return
    from pipeline.commands.plan import plan_run, shown_plan
    from pipeline.config import load_config

    planned = plan_run(load_config(run_file, settings or []))
    if as_json:
        _print_json(planned.values())
        return
    _show_all(shown_plan(planned))


@app.command()
def compare(
    run_file: RunFile,
    settings: Settings = None,
    output_format: Annotated[TableFormat, typer.Option("--format", help="table, markdown or json.")] = TableFormat.TABLE,
    as_json: AsJson = False,
) -> None:
    """Show a finished run's variants side by side: perplexity of every target and format, over all text and by domain; a star
    marks the best. Scores of tasks too, tasks across."""
    from pipeline.commands.compare import comparisons
    from pipeline.config import load_config

    found, scores = comparisons(load_config(run_file, settings or []))
    console = _output()
    if as_json or output_format is TableFormat.JSON:
        tasks = scores.values() if scores is not None else {}
        _print_json({"comparisons": [one.values() for one in found], **tasks})
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
def schema() -> None:
    """Print the JSON schema of run files, for editors that complete and check YAML."""
    from pipeline.commands.schema import run_file_schema

    typer.echo(json.dumps(run_file_schema(), indent=2))


@app.command()
def inspect(
    model: Model,
    revision: Revision = None,
    context: Context = 8192,
    batch: Batch = 1,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is, whether it is supported and what merged versions would weigh, from its headers alone."""
    from pipeline.commands.inspect import inspect_model, shown_facts

    facts = inspect_model(model, revision, context, batch)
    if as_json:
        _print_json(facts.values())
        return
    _show_all(shown_facts(facts))


@app.command("export-gguf")
def export_gguf(
    run_dir: RunDir,
    name: Annotated[str, typer.Argument(help="A stock export's name under RUN_DIR/models.", metavar="NAME")],
    outtype: Annotated[GgufType, typer.Option(help="Number format; auto: the source's 16-bit one.")] = GgufType.AUTO,
) -> None:
    """Convert a finished stock export to GGUF with llama.cpp's converter, which has to be installed."""
    from pipeline.commands.export_gguf import export_gguf as export

    show(_output(), f"gguf  {export(run_dir, name, outtype.value)}")


@app.command()
def status(
    run_dir: RunDir,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew until the run ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far a run is, from its files alone."""
    from pipeline.commands.status import describe_status, read_status

    if watch and as_json:
        raise InputError("--watch and --json exclude each other; leave one out")
    if watch:
        from pipeline.commands.watch import watch as watch_run

        watch_run(run_dir, _output())
        return
    if as_json:
        _print_json(read_status(run_dir).values())
        return
    _show_all(describe_status(run_dir))


@app.command()
def push(
    run_dir: RunDir,
    name: Annotated[str, typer.Argument(help="Name of a checkpoint, as under RUN_DIR/models.", metavar="NAME")],
    repo: Annotated[str, typer.Argument(help="Repository of the hub; made if it does not exist.", metavar="ORG/REPO")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    license_id: Annotated[str, typer.Option("--license", help="Licence for the card, such as apache-2.0.")] = "",
    no_license: Annotated[bool, typer.Option("--no-license", help="Publish although no licence is known.")] = False,
    incomplete: Annotated[bool, typer.Option("--incomplete", help="Publish although scores of tasks are lacking.")] = False,
) -> None:
    """Publish a checkpoint of a finished run on the hub, with its scores in the card; the same command resumes."""
    from pipeline.commands.push import Told
    from pipeline.commands.push import push as upload

    show(_output(), upload(run_dir, name, repo, private, Told(license_id, no_license, incomplete)))


def main() -> None:
    """Entry point. Exit codes: `pipeline.errors.EXIT_CODES`.

    A bug of this program prints its traceback, even when the bug raises an OSError.
    """
    watch_signals()
    errors = Console(stderr=True)
    try:
        app()
    except InputError as e:
        show(errors, f"error: {e}")
        sys.exit(BAD_INPUT)
    except RunFailed as e:
        show(errors, f"failed: {e}")
        sys.exit(FAILED)
    except failures() as e:
        if not is_outside(e):
            raise
        reason = " ".join(str(e).split())
        show(errors, f"failed: {reason}; what was finished is kept: mend this and the same command continues from there")
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
