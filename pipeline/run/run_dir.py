"""Checks that a run can work in a run directory: it is writable, and no foreign file is in the way."""

import os
import stat
from pathlib import Path

from pipeline.errors import RunFailed
from pipeline.run.owned import IDENTITY_FILE, check_unlinked
from pipeline.run.publish import MODELS_DIR
from pipeline.run.record import RUN_FILE, check_no_older_run
from pipeline.run.view import RunView
from pipeline.state.manifest import MANIFESTS_DIR
from stages.contracts.errors import InputError
from stages.contracts.events import EVENTS_FILE
from stages.contracts.paths import REPORT_FILE, REPORT_PAGE_FILE, TRANSIENT_DIRS
from stages.io.storage import is_remote


def check_run_dir(view: RunView) -> None:
    """Check a run directory before anything is written to it. Reads only file names and the format version of an older run.

    Raises InputError if the model folder and the run directory overlap, or if symbolic links or foreign files stand where the
    run will write. Raises RunFailed if the directory is not writable.
    """
    run_dir, stage_dirs = view.run_dir, [part.dir for part in view.all_parts()]
    _check_apart(run_dir, view.model, stage_dirs)
    check_no_older_run(run_dir)
    names = [target.name for target in view.targets]
    if is_remote(run_dir):
        return
    _check_writable(run_dir)
    for name in stage_dirs:
        _check_folder(run_dir / name)
        for part in (*TRANSIENT_DIRS, MANIFESTS_DIR):
            check_unlinked(run_dir, run_dir / name / part)
            _check_folder(run_dir / name / part)
        _check_file(run_dir / name / IDENTITY_FILE)
    for name in (RUN_FILE, EVENTS_FILE, REPORT_FILE, REPORT_PAGE_FILE):
        _check_file(run_dir / name)
    models = run_dir / MODELS_DIR
    check_unlinked(run_dir, models)
    _check_folder(models)
    for name in names:
        if os.path.lexists(models / name) and not (models / name).is_symlink():
            raise InputError(f"{models / name} is not a link that an earlier run has made; move it away, the model goes there")


def _check_apart(run_dir: Path, model: Path, stage_dirs: list[str]) -> None:
    if run_dir == model or model in run_dir.parents:
        where = "is" if run_dir == model else "lies in"
        raise InputError(
            f"run_dir {run_dir} {where} the model's folder {model}, whose files are exported with the model; give a folder "
            "elsewhere"
        )
    for name in stage_dirs:
        if run_dir / name in (model, *model.parents):
            raise InputError(f"model {model} lies in {run_dir / name}, which this run writes to; move the model elsewhere")


def _check_file(path: Path) -> None:
    """Raise unless the path is free or a regular file: a link may lead elsewhere, and opening a pipe may block."""
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise InputError(f"{path} is no regular file; remove it, a file of the run goes there")


def _check_folder(path: Path) -> None:
    """Raise unless the path is free or a writable folder."""
    if path.exists():
        _check_writable(path)


def _check_writable(folder: Path) -> None:
    """Raise unless a folder can be written to or created. Writes nothing, so that a refused run leaves no traces."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise RunFailed(f"{folder} cannot be written to: {existing} is not a folder; give another run_dir or move it away")
    with_rights_of_process = os.access in os.supports_effective_ids
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=with_rights_of_process):
        raise RunFailed(
            f"{folder} cannot be written to: {existing} is read-only for user {os.geteuid()}; change its permissions or "
            "give another run_dir"
        )
