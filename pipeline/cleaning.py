"""`clean`: what no key of the last run uses."""

import shutil
from pathlib import Path

from pipeline.lock import RunLock
from pipeline.run_state import IDENTITY_FILE
from pipeline.status import load_graph


def unused(run_dir: Path) -> list[Path]:
    """Stage directories of other settings than the last run's. Raises InputError when there was no run."""
    graph = load_graph(run_dir)
    used = {stage.dir for stage in graph.stages.all()}
    return sorted(path.parent for path in graph.run_dir.glob(f"*/{IDENTITY_FILE}") if path.parent.name not in used)


def remove(run_dir: Path, folders: list[Path]) -> None:
    """Remove stage directories, and the names under `models/` that led to them. Raises InputError while a driver runs."""
    with RunLock(run_dir.resolve()):
        for folder in folders:
            (folder / IDENTITY_FILE).unlink()  # first: what is half removed is no result any more
            shutil.rmtree(folder)
        for link in (run_dir / "models").glob("*"):
            if link.is_symlink() and not link.exists():
                link.unlink()


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; hard links count each time."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
