"""`batch`: many run files on one cluster in one job. Units of all runs interleave; a failed run does not stop the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from rich import filesize
from rich.console import Console
from rich.table import Table

from pipeline import checks
from pipeline.commands.run import MakeExecutor, run_all
from pipeline.config import load_config
from pipeline.display.printing import add_row, show
from pipeline.display.problems import problems
from pipeline.display.progress import Reporter
from pipeline.display.tables import experts_text, perplexity_text
from pipeline.driver.run_state import RunOptions, RunState
from pipeline.errors import RunFailed
from pipeline.yaml_files import read_yaml
from stages.contracts.errors import InputError
from stages.contracts.settings import Resources, RunConfig
from stages.io.files import write_json
from stages.io.storage import as_path

BATCH_FILE = "batch.json"


class BatchEntry(BaseModel):
    """One run of a batch."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    run: Path
    """Run file; its path is relative to the current directory."""
    set: dict[str, JsonValue] = {}
    """Settings that override those of the run file, by their dotted names."""


class BatchConfig(BaseModel):
    """A batch file."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch_dir: str
    """Folder in which `batch.json` is written."""
    runs: Annotated[tuple[BatchEntry, ...], Field(min_length=1)]
    """The runs, in the order in which they are listed."""
    resources: Resources = Resources()
    """Resources of the workers, which all runs share. They replace the `resources` of each run file."""


@dataclass(frozen=True)
class BatchResult:
    """Outcome of a batch. num_failed: number of runs that were refused or that failed. records: what `batch.json` holds."""

    table: Table
    path: Path
    num_failed: int
    records: tuple[Mapping[str, Any], ...]


def load_batch(path: Path) -> BatchConfig:
    """Read a batch file. Raises InputError that names the file, the key and the allowed values."""
    values = read_yaml(path, "batch file")
    if not isinstance(values, dict):
        raise InputError(f"batch file {path} must hold batch_dir and runs; write both")
    try:
        return BatchConfig.model_validate(values)
    except ValidationError as e:
        raise InputError(f"{path}: {problems(e)}") from e


def _config(batch: BatchConfig, entry: BatchEntry) -> RunConfig:
    return load_config(entry.run, [], entry.set).model_copy(update={"resources": batch.resources})


def run_batch(batch: BatchConfig, make_executor: MakeExecutor, console: Console, options: RunOptions) -> BatchResult:
    """Run a batch and reuse finished units. Raises InputError when none of its runs can start."""
    refused: dict[int, str] = {}
    states: dict[int, RunState] = {}
    for number, entry in enumerate(batch.runs):
        try:
            config = _config(batch, entry)
            state = RunState(checks.check(config), Reporter(console, f"[{number + 1}] "), options)
        except (InputError, RunFailed) as e:
            refused[number] = str(e)
            continue
        for other, earlier in states.items():
            if earlier.run_dir == state.run_dir:
                raise InputError(f"runs {other + 1} and {number + 1} have the same run_dir {state.run_dir}; give each its own")
        states[number] = state
    if not states:
        raise InputError("\n".join(refused.values()))
    for number, message in refused.items():
        show(console, f"[{number + 1}] refused: {message}")
    run_all(list(states.values()), make_executor, Reporter(console))
    records = [_record(batch.runs[number], states.get(number), refused.get(number)) for number in range(len(batch.runs))]
    for number, record in enumerate(records, 1):
        for warning in record["warnings"]:
            Reporter(console, f"[{number}] ").line(f"warning: {warning}")
    path = write_json(as_path(batch.batch_dir) / BATCH_FILE, {"runs": records}).path
    return BatchResult(_summary(records), path, sum(record["error"] is not None for record in records), tuple(records))


def _record(entry: BatchEntry, state: RunState | None, refusal: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "run": str(entry.run),
        "set": entry.set,
        "run_dir": None,
        "error": refusal,
        "models": [],
        "warnings": [],
    }
    if state is not None:
        record["run_dir"] = str(state.run_dir)
        try:
            result = state.result()
            record |= {key: result.report[key] for key in ("models", "warnings")}
            record |= {"num_run": result.num_run, "num_reused": result.num_reused}
            record["error"] = "\n".join(result.shortfalls) or None
        except (InputError, RunFailed) as e:
            record["error"] = str(e)
    return record


def _summary(records: Sequence[dict[str, Any]]) -> Table:
    table = Table("run", "model", "experts a layer", "bytes", "perplexity", "result", title=None)
    for number, record in enumerate(records, 1):
        if record["error"] is not None:
            first_line = record["error"].partition("\n")[0]
            add_row(table, (number, record["run"], "", "", "", f"failed: {first_line}"))
        for model in record["models"]:
            size, experts = filesize.decimal(model["bytes"]), experts_text(model["num_experts"], model.get("num_neurons"))
            add_row(table, (number, model["name"], experts, size, perplexity_text(model), model["path"]))
    return table
