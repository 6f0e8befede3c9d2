"""Identities of a run's inputs: digests of the model and the texts, and the differences between two identities."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from pipeline.run.weights_identity import weights_identity
from stages.checkpoint.folder import CONFIG_FILE, INDEX_FILE, Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.keys import Identity
from stages.harness.files import TaskFolder
from stages.io.files import sha256_of
from stages.io.texts import TextFile, list_files


def model_identity(checkpoint: Checkpoint) -> dict[str, JsonValue]:
    """Content of config, index and side files of a checkpoint, and a digest for each weight file (`weights_identity`)."""
    small = [CONFIG_FILE, *checkpoint.side_files.kept]
    if checkpoint.index:
        small.append(INDEX_FILE)
    files: dict[str, JsonValue] = {name: sha256_of(checkpoint.folder / name) for name in small}
    return {"files": files, "weights": dict[str, JsonValue](weights_identity(checkpoint))}


def files_identity(data: Sequence[str], place: str) -> dict[str, JsonValue]:
    """Digests of a text's files, in their order. Raises InputError for a file that is missing or cannot be read."""
    return {f"{number} {file.name}": _digest(file, place) for number, file in enumerate(list_files(data, place), 1)}


def tasks_identity(folder: Path, tasks: Sequence[str], place: str) -> dict[str, JsonValue]:
    """For each task, digests of the files in a folder that it reads, by path. Raises InputError for a folder that is missing,
    or that holds a file that cannot be read."""
    found = TaskFolder(folder, place)
    digests: dict[Path, str] = {}

    def named(path: Path) -> str:
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()

    def digest(path: Path) -> str:
        if path not in digests:
            digests[path] = sha256_of(path)
        return digests[path]

    try:
        return {task: {named(path): digest(path) for path in found.files_of(task)} for task in tasks}
    except OSError as e:
        raise InputError(
            f"{place}: {e.filename} cannot be read: {e.strerror or e}; change its permissions, or give another file"
        ) from e


def _digest(file: TextFile, place: str) -> str:
    try:
        return sha256_of(file.path)
    except OSError as e:
        raise InputError(
            f"{place}.data: {file.path} cannot be read: {e.strerror or e}; change its permissions, or give another file"
        ) from e


def differences(old: Identity, new: Identity, prefix: str = "") -> Iterator[str]:
    """Differences between two identities, one line per setting: `linkage: average -> single`."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}: {before} -> {after}"
