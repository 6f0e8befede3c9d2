"""Tells which files and folders in a run directory were made by this program and may be deleted.

A run directory may contain symbolic links and folders of other people. Nothing is deleted through a link. A folder is deleted
only if its name is that of a stage folder and ends with the key of the identity stored inside it.
"""

import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.contracts.errors import InputError
from stages.contracts.keys import KEY_LENGTH, key_of
from stages.io.storage import is_remote, remove_tree
from stages.io.untrusted import read_json
from stages.registry import stage_names

IDENTITY_FILE = "identity.json"
_MAX_IDENTITY_BYTES = 1 << 26


def _key_in(name: str) -> str | None:
    """The key at the end of a stage folder's name; None for any other name."""
    named = re.fullmatch(rf"(?:{'|'.join(stage_names())})(?:-[\w.+ -]+)?-([0-9a-f]{{{KEY_LENGTH}}})", name, re.ASCII)
    return named[1] if named else None


def is_stage_dir(name: str) -> bool:
    """Whether a folder name has the form that this program gives to stage folders."""
    return _key_in(name) is not None


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity that a stage folder was made for; None if it holds no readable identity."""
    try:
        identity = read_json(folder / IDENTITY_FILE, _MAX_IDENTITY_BYTES)
    except InputError:
        return None
    return identity if isinstance(identity, dict) else None


def recorded_key(folder: Path) -> str | None:
    """The key of the identity that a stage folder was made for; None if it holds no readable identity."""
    try:
        identity = read_identity(folder)
        return None if identity is None else key_of(identity)
    except (ValueError, RecursionError):  # NaN or a lone surrogate: this program writes neither
        return None


def stage_folders(run_dir: Path) -> Iterator[Path]:
    """The folders that stages have made in a run directory: no symbolic links, and each name ends with its identity's key."""
    for path in sorted(run_dir.iterdir(), key=str):
        key = _key_in(path.name)
        if key is not None and is_unlinked_folder(path) and recorded_key(path) == key:
            yield path


def is_unlinked_folder(path: Path) -> bool:
    """Whether a path is a folder and not a symbolic link."""
    if is_remote(path):
        return path.is_dir()
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def check_unlinked(run_dir: Path, path: Path) -> None:
    """Raise InputError if a path below a run directory contains a symbolic link, since it leads out of the run directory."""
    if is_remote(run_dir):
        return  # object storage has no links
    for part in (path, *path.parents):
        if part == run_dir:
            return
        if part.is_symlink():
            raise InputError(
                f"{part} is a link; a run deletes files in this folder, and never through links: put a real folder in its "
                "place, or remove the link"
            )
    raise AssertionError(f"{path} is not below {run_dir}")


def remove_file(run_dir: Path, relative: str) -> None:
    """Delete a file of the run, never through a symbolic link. A missing file is no error."""
    path = run_dir / relative
    check_unlinked(run_dir, path.parent)
    path.unlink(missing_ok=True)


def remove_stage_folder(run_dir: Path, folder: Path, seals: str) -> None:
    """Remove a stage folder. Its seals are removed first, so that a half-removed folder is never taken for a result. Its
    identity is removed last, so that the rest of the folder can still be recognised. Raises OSError if anything cannot be
    removed."""
    check_unlinked(run_dir, folder)
    remove_tree(folder / seals, is_strict=True)
    if not is_remote(folder):
        for path in folder.iterdir():
            if path.name == IDENTITY_FILE:
                continue
            if is_unlinked_folder(path):
                remove_tree(path, is_strict=True)
            else:
                path.unlink()
    remove_tree(folder, is_strict=True)
