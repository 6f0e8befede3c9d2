"""Functions of the Python API. They check, plan and run as the commands do."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from pipeline.api.asked import PathName, TargetLike, Text, asked_config
from pipeline.api.results import Inspection, Report, Result
from pipeline.commands.inspect import inspect_model
from pipeline.commands.plan import RunPlan, plan_run
from pipeline.commands.run import run
from pipeline.display.notebook import reporter_here
from pipeline.driver.process import prepare_to_compute
from pipeline.driver.run_state import RunOptions
from pipeline.errors import RunFailed
from pipeline.executors.choice import make_executor

NO_SETTINGS: Mapping[str, JsonValue] = {}


def compress(
    model: PathName,
    *,
    target: TargetLike | Sequence[TargetLike],
    method: str | Sequence[str],
    data: Text,
    run_dir: PathName | None = None,
    evaluation: Text | None = None,
    formats: str | Sequence[str] | None = "stock",
    settings: Mapping[str, JsonValue] = NO_SETTINGS,
    address: str | None = None,
    progress: bool = True,
) -> Result:
    """Make a Mixture-of-Experts model smaller. The same call continues after whatever stopped it, and reuses what is finished.

    model: checkpoint folder, URL, or `org/name` of the hub. target: how many experts a layer keeps, as a number (6) or a share
    of the source's (0.5); a tuple has one number for each layer; a mapping is a target as run files have it; a list holds
    several. method: name of a preset, or several, each of which is made for every target. data: calibration text; a mapping
    names domains. evaluation: held-out text for perplexity. run_dir: `runs/<model>` by default. formats: "stock", "tied" or
    both; None leaves the choice to the settings. settings: any other setting of a run file by its dotted name, such as
    {"calibration.num_sequences": 128}. address: None runs in this process; "auto" on the Ray cluster that this process is
    connected to, else on a running or new one; or "local", or HOST:PORT. progress: show it, as bars in a terminal or notebook.

    Raises InputError for bad input, before anything is computed, and RunFailed where units have failed.
    """
    config = asked_config(model, target, method, data, run_dir, evaluation, formats, settings)

    prepare_to_compute()
    with reporter_here(is_shown=progress) as reporter:
        done = run(config, lambda: make_executor(address, config.resources, reporter.line), reporter, RunOptions())
    if done.shortfalls:
        raise RunFailed("\n".join((*done.shortfalls, "all else is finished; try these again by the same call")))
    return Result(done.report_path.parent, Report.of(done.report_path), done.num_run, done.num_reused, done.elapsed_s)


def plan(
    model: PathName,
    *,
    target: TargetLike | Sequence[TargetLike],
    method: str | Sequence[str],
    data: Text,
    run_dir: PathName | None = None,
    evaluation: Text | None = None,
    formats: str | Sequence[str] | None = "stock",
    settings: Mapping[str, JsonValue] = NO_SETTINGS,
) -> RunPlan:
    """What `compress` with the same arguments would do and need. Runs and writes nothing. Raises InputError for bad input."""
    return plan_run(asked_config(model, target, method, data, run_dir, evaluation, formats, settings))


def inspect(model: PathName, revision: str | None = None) -> Inspection:
    """What a checkpoint is, whether it is supported, and what smaller versions would weigh, from its headers alone.
    Raises InputError for a model that cannot be read."""
    return Inspection.of(inspect_model(str(model), revision))


def load_report(where: PathName) -> Report:
    """The report of a finished run: its run directory, or its `report.json`. Raises InputError where there is none."""
    return Report.of(Path(where) if not isinstance(where, str) else where)
