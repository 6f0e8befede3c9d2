"""`clean`: what no key of the last run uses."""

from pathlib import Path

from pipeline.lock import RunLock
from pipeline.publish import unpublish_lost
from pipeline.run_state import IDENTITY_FILE
from pipeline.status import load_graph
from stages.common.storage import absolute, remove_tree


def unused(run_dir: str | Path) -> list[Path]:
    """Stage directories of other settings than the last run's. Raises InputError when there was no run."""
    graph = load_graph(run_dir)
    used = {stage.dir for stage in graph.stages.all()}
    return sorted(path.parent for path in graph.run_dir.glob(f"*/{IDENTITY_FILE}") if path.parent.name not in used)


def remove(where: str | Path, folders: list[Path]) -> None:
    """Remove stage directories, and the names under `models/` that led to them. Raises InputError while a driver runs."""
    run_dir = absolute(where)
    with RunLock(run_dir):
        for folder in folders:
            (folder / IDENTITY_FILE).unlink()  # first: what is half removed is no result any more
            remove_tree(folder)
        unpublish_lost(run_dir)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; hard links count each time."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
