"""What in a run directory is its own, and may be deleted: folders and files that this program has made there.

A run directory may hold links and folders of anybody's. Nothing is deleted through a link, and of folders only those whose name
is that of a stage and ends with the key of the identity that lies in them.
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
    """The key at the end of a name that this program gives to folders of stages; None for any other name."""
    named = re.fullmatch(rf"(?:{'|'.join(stage_names())})(?:-[\w.+ -]+)?-([0-9a-f]{{{KEY_LENGTH}}})", name, re.ASCII)
    return named[1] if named else None


def is_stage_dir(name: str) -> bool:
    """Whether a folder is named as this program names those of stages."""
    return _key_in(name) is not None


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity that a stage's folder was made for; None if it has none that can be read."""
    try:
        identity = read_json(folder / IDENTITY_FILE, _MAX_IDENTITY_BYTES)
    except InputError:
        return None
    return identity if isinstance(identity, dict) else None


def recorded_key(folder: Path) -> str | None:
    """The key of the identity that a stage's folder was made for; None if it has none that can be read."""
    try:
        identity = read_identity(folder)
        return None if identity is None else key_of(identity)
    except (ValueError, RecursionError):  # NaN, a lone surrogate: none of ours
        return None


def stage_folders(run_dir: Path) -> Iterator[Path]:
    """The folders that stages have made in a run directory: no links, each with the identity whose key is in its name."""
    for path in sorted(run_dir.iterdir(), key=str):
        key = _key_in(path.name)
        if key is not None and is_unlinked_folder(path) and recorded_key(path) == key:
            yield path


def is_unlinked_folder(path: Path) -> bool:
    """Whether a path is a folder, and no link to one."""
    if is_remote(path):
        return path.is_dir()
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def check_unlinked(run_dir: Path, path: Path) -> None:
    """Raise InputError if a link stands anywhere between a run directory and a path below it: it leads elsewhere."""
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
    """Delete a file of the run, never through a link; one that is gone is fine."""
    path = run_dir / relative
    check_unlinked(run_dir, path.parent)
    path.unlink(missing_ok=True)


def remove_stage_folder(run_dir: Path, folder: Path, seals: str) -> None:
    """Remove a stage's folder: its seals first, since what is half removed is no result, and its identity last, so that it is
    still known for what it is. Raises OSError if anything stays."""
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
