"""`run.json`: what the last run of a run directory was given, for `status` and `clean`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import __version__
from pipeline.config import RunConfig, problems
from pipeline.hub_data import is_identity
from stages.contracts.errors import InputError
from stages.io.files import write_json
from stages.io.storage import check_readable
from stages.io.untrusted import read_json

RUN_FILE = "run.json"
FORMAT = 2


class RunRecord(BaseModel):
    """What a run was given, and the folders of its stages.

    model: folder or URL of the checkpoint. identities: of the model and of each text. stage_dirs: relative to the run
    directory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    hcsmoe: str
    config: RunConfig
    model: str
    identities: dict[str, dict[str, Any]]
    stage_dirs: tuple[str, ...]


def write_record(run_dir: Path, config: RunConfig, model: Path, identities: Mapping[str, Any], stage_dirs: list[str]) -> None:
    """Record a run that begins."""
    record = {
        "format": FORMAT,
        "hcsmoe": __version__,
        "config": config.model_dump(mode="json"),
        "model": str(model),
        "identities": identities,
        "stage_dirs": stage_dirs,
    }
    write_json(run_dir / RUN_FILE, record)


def read_record(run_dir: Path) -> RunRecord:
    """What the last run was given. Raises InputError when there was none, or when its record cannot be read."""
    check_readable(run_dir)
    path = run_dir / RUN_FILE
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{run_dir} is not a run directory: it has no {RUN_FILE}; give the run_dir of a run file")
    value = read_json(path)
    remedy = "look at it with that version, or run its run file again with this one, which writes it anew"
    if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
        raise InputError(f"{path} is no record of a run; run the run file again, which writes it anew")
    if value.get("format") != FORMAT:
        raise InputError(
            f"{path} was written by another version of hcsmoe (format {value.get('format', 1)!r:.20}, this is {FORMAT}); "
            f"{remedy}"
        )
    try:
        record = RunRecord.model_validate(value)
    except ValidationError as e:
        raise InputError(
            f"{path} was written by another version of hcsmoe ({value.get('hcsmoe')!r:.20}, this is {__version__!r}): "
            f"{problems(e)}; {remedy}"
        ) from e
    texts = ["calibration", *(["evaluation"] if record.config.evaluation else [])]
    if not {"model", *texts} <= record.identities.keys() or not all(is_identity(record.identities[text]) for text in texts):
        raise InputError(f"{path} is no record of a run; run the run file again, which writes it anew")
    return record
