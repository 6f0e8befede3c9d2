"""What a user looks for by name: finished models and the report. Names appear whole, and switch at once."""

import os
import uuid
from pathlib import Path

from stages.common.files import copy_file

MODELS_DIR = "models"


def publish_model(run_dir: Path, name: str, folder: Path) -> Path:
    """Let `models/<name>` lead to a finished folder, by a relative link that replaces an older one in one step.

    The folder itself keeps its key, so a changed setting overwrites nothing.
    """
    link = run_dir / MODELS_DIR / name
    link.parent.mkdir(parents=True, exist_ok=True)
    destination = os.path.relpath(folder, link.parent)
    if link.is_symlink() and os.readlink(link) == destination:
        return link
    temporary = link.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{name}")
    temporary.symlink_to(destination, target_is_directory=True)
    os.replace(temporary, link)
    return link


def publish_report(run_dir: Path, report: Path) -> Path:
    """Copy the report to the top of the run directory."""
    return copy_file(report, run_dir / report.name).path
