"""`run.json`: the settings and inputs of the last run in a run directory, for `status` and `clean`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, PositiveInt, ValidationError

from pipeline import __version__
from pipeline.config import read_config
from pipeline.display.problems import problems
from pipeline.hub_data import is_identity
from pipeline.run.view import Inputs, RunView
from stages.contracts.errors import InputError
from stages.contracts.settings import RunConfig
from stages.contracts.texts import texts_of
from stages.contracts.widths import ExpertSizes
from stages.io.files import write_json
from stages.io.storage import absolute, as_path, check_readable
from stages.io.untrusted import read_json

RUN_FILE = "run.json"
FORMAT = 3
_REMEDY = "use that version, or give another run_dir"


class RunRecord(BaseModel):
    """Inputs of a run and the folders of its stages.

    model: folder or URL of the checkpoint. identities: identity of the model and of each text. expert_sizes: as
    `Run.expert_sizes`. stage_dirs: relative to the run directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    hcsmoe: str
    config: RunConfig
    model: str
    identities: dict[str, dict[str, JsonValue]]
    expert_sizes: tuple[PositiveInt, PositiveInt] | None = None
    stage_dirs: tuple[str, ...]


def write_record(view: RunView) -> None:
    """Write `run.json` for a run that begins."""
    record = {
        "format": FORMAT,
        "hcsmoe": __version__,
        "config": view.config.model_dump(mode="json"),
        "model": str(view.model),
        "identities": view.inputs.identities,
        "expert_sizes": view.inputs.expert_sizes,
        "stage_dirs": [part.dir for part in view.all_parts()],
    }
    write_json(view.run_dir / RUN_FILE, record)


def recorded_view(where: str | Path) -> RunView:
    """The last run in a run directory, for inspection only. Raises InputError when there was no run."""
    run_dir = absolute(where)
    record = read_record(run_dir)
    sizes = None if record.expert_sizes is None else ExpertSizes(*record.expert_sizes)
    return RunView(record.config, Inputs(as_path(record.model), record.identities, sizes), run_dir=run_dir)


def _check_format(path: Path, value: Mapping[str, Any]) -> None:
    if value.get("format") != FORMAT:
        raise InputError(
            f"{path} was written by another version of hcsmoe (format {value.get('format', 1)!r:.20}, this is {FORMAT}); "
            f"{_REMEDY}"
        )


def check_no_older_run(run_dir: Path) -> None:
    """Raise InputError for a run directory of another format version.
    An unreadable record raises nothing: the run replaces it."""
    path = run_dir / RUN_FILE
    try:
        value = read_json(path)
    except (InputError, OSError):
        return
    if isinstance(value, dict) and isinstance(value.get("config"), dict):
        _check_format(path, value)


def read_record(run_dir: Path) -> RunRecord:
    """The record of the last run. Raises InputError when there was no run, or when the record cannot be read."""
    check_readable(run_dir)
    path = run_dir / RUN_FILE
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{run_dir} is not a run directory: it has no {RUN_FILE}; give the run_dir of a run file")
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        raise InputError(f"{path} is no record of a run; run the run file again, which writes it anew")
    _check_format(path, value)
    try:
        config = read_config(value["config"])
        record = RunRecord.model_validate({**value, "config": config})
    except ValidationError as e:
        raise InputError(
            f"{path} was written by another version of hcsmoe ({value.get('hcsmoe')!r:.20}, this is {__version__!r}): "
            f"{problems(e)}; {_REMEDY}"
        ) from e
    texts = texts_of(record.config)
    if not {"model", *texts} <= record.identities.keys() or not all(is_identity(record.identities[text]) for text in texts):
        raise InputError(f"{path} is no record of a run; run the run file again, which writes it anew")
    return record
