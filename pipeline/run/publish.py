"""Publishes results by name: finished models and the report.
A name appears only when its result is whole, and is replaced in one step."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pipeline.run.owned import is_stage_dir, is_unlinked_folder
from stages.checkpoint.folder import CONFIG_FILE
from stages.contracts.paths import CHECKPOINT_DIR
from stages.contracts.spec import Publication
from stages.io.files import copy_file, link_or_copy, write_bytes
from stages.io.storage import is_remote, remove_tree
from stages.io.untrusted import read_small

MODELS_DIR = "models"
_MAX_NAME_BYTES = 1 << 12
PUBLISHED_FILE = ".published"
"""On object storage: file in a published folder that names the stage folder it is a copy of; written last."""


def publish(run_dir: Path, publication: Publication, check: Callable[[], None]) -> None:
    """Publish a finished result under its name. check: called before each step; it raises to stop."""
    if publication.is_folder:
        publish_model(run_dir, publication.name, run_dir / publication.source, check)
    else:
        check()
        copy_file(run_dir / publication.source, run_dir / publication.name)


def publish_model(run_dir: Path, name: str, folder: Path, check: Callable[[], None]) -> Path:
    """Make `models/<name>` a relative link to a finished folder. An older link is replaced in one step.

    The folder's own name contains its key, so a changed setting overwrites nothing. Object storage has no links, so the store
    copies the folder instead. check: called before each step; it raises to stop.
    """
    check()
    link = run_dir / MODELS_DIR / name
    if is_remote(run_dir):
        _publish_copy(link, folder, check)
        return link
    link.parent.mkdir(parents=True, exist_ok=True)
    destination = os.path.relpath(folder, link.parent)
    if link.is_symlink() and os.readlink(link) == destination:
        return link
    temporary = link.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{name}")
    temporary.symlink_to(destination, target_is_directory=True)
    os.replace(temporary, link)
    return link


def _publish_copy(published: Path, folder: Path, check: Callable[[], None]) -> None:
    """Copy a folder. An old config is removed first and the new one copied last, so that nobody loads a half-copied model."""
    if _published_from(published) == folder.parent.name:
        return
    for name in (PUBLISHED_FILE, CONFIG_FILE):
        (published / name).unlink(missing_ok=True)
    remove_tree(published)
    names = [path.name for path in folder.iterdir() if path.name != CONFIG_FILE]
    for name in (*names, CONFIG_FILE):
        check()
        link_or_copy(folder / name, published / name)
    check()
    write_bytes(published / PUBLISHED_FILE, folder.parent.name.encode())


def _published_from(published: Path) -> str | None:
    """Stage directory of which a published folder is a complete copy; None if it is not one."""
    try:
        return read_small(published / PUBLISHED_FILE, _MAX_NAME_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return None


def unpublish_lost(run_dir: Path, keep: str | None = None) -> None:
    """Remove names under `models/` whose stage folder in this run directory no longer exists.
    keep: a name to leave in place."""
    models = run_dir / MODELS_DIR
    if not is_unlinked_folder(models):
        return
    for path in models.iterdir():
        source = _published_from(path) if is_remote(run_dir) else _linked_from(path)
        if source is not None and is_stage_dir(source) and not (run_dir / source).exists() and path.name != keep:
            if is_remote(run_dir):
                remove_tree(path)
            else:
                path.unlink()


def _linked_from(link: Path) -> str | None:
    """Stage directory that a link under `models/` points to; None for any other path."""
    parts = PurePosixPath(os.readlink(link)).parts if link.is_symlink() else ()
    return parts[1] if len(parts) == 3 and parts[0] == ".." and parts[2] == CHECKPOINT_DIR else None
