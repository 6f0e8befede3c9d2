"""`clean`: lists or removes stage folders that the last run does not use."""

from collections.abc import Iterator
from pathlib import Path

from rich import filesize

from pipeline.run.owned import remove_stage_folder, stage_folders
from pipeline.run.publish import unpublish_lost
from pipeline.run.record import RunRecord, read_record
from pipeline.state.lock import RunLock
from pipeline.state.manifest import MANIFESTS_DIR
from stages.contracts.texts import texts_of
from stages.io.storage import absolute, is_remote


def describe_unused(where: str | Path) -> Iterator[str]:
    """Lines that list the stage folders that the last run does not use. Raises InputError when the directory holds no run."""
    run_dir = absolute(where)
    folders = unused(run_dir, read_record(run_dir))
    for folder in folders:
        yield f"{folder.name}  {filesize.decimal(size_of(folder))}"
    yield f"{len(folders)} directories not used by the last run; --yes removes them"


def remove_unused(where: str | Path) -> Iterator[str]:
    """Remove unused stage folders, and the names under `models/` that pointed to them. Yields a line for each removed path.

    Raises InputError when the directory holds no run or a driver is working in it, OSError for a path that cannot be removed.
    """
    run_dir = absolute(where)
    read_record(run_dir)  # raises before RunLock would create a lock file in a directory that holds no run
    with RunLock(run_dir) as lock:
        record = read_record(run_dir)
        folders = unused(run_dir, record)
        for folder in folders:
            num_bytes = size_of(folder)
            lock.check()
            remove_stage_folder(run_dir, folder, MANIFESTS_DIR)
            yield f"{folder.name}  {filesize.decimal(num_bytes)}  removed"
        lock.check()
        unpublish_lost(run_dir, keep=_top(run_dir / "models", record.model))
    yield f"{len(folders)} directories removed"


def unused(run_dir: Path, record: RunRecord) -> list[Path]:
    """Stage folders of other settings. Folders that the last run reads are excluded: its model may be an earlier run's
    result."""
    inputs = [record.model, *(name for text in texts_of(record.config).values() for name in text.data)]
    used = {*record.stage_dirs, *(_top(run_dir, name) for name in inputs)}
    return [folder for folder in stage_folders(run_dir) if folder.name not in used]


def _top(folder: Path, name: str) -> str | None:
    """First path component of `name` below a folder; None if `name` points outside the folder."""
    if is_remote(folder):
        inside = name.removeprefix(f"{folder}/")
        return inside.partition("/")[0] if inside != name else None
    path = Path(name).resolve()
    return path.relative_to(folder).parts[0] if path != folder and path.is_relative_to(folder) else None


def size_of(folder: Path) -> int:
    """Total bytes of all files below a folder. Each hard link counts; symbolic links do not."""
    return sum(path.stat().st_size for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
