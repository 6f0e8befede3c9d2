"""Keys: what a result depends on, hashed. Equal keys mean equal results; a changed key can be explained as a diff."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.run.weights_identity import weights_identity
from stages.checkpoint.folder import CONFIG_FILE, INDEX_FILE, Checkpoint
from stages.contracts.errors import InputError
from stages.io.files import sha256_of
from stages.io.texts import TextFile, list_files

KEY_LENGTH = 12


def key_of(identity: Mapping[str, Any]) -> str:
    """Shortened SHA-256 of the canonical JSON of an identity."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def model_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """The root: content of config, index and side files, and a digest for each weight file (see `weights_identity`)."""
    small = [CONFIG_FILE, *checkpoint.side_files.kept]
    if checkpoint.index:
        small.append(INDEX_FILE)
    return {"files": {name: sha256_of(checkpoint.folder / name) for name in small}, "weights": weights_identity(checkpoint)}


def files_identity(data: Sequence[str], place: str) -> dict[str, str]:
    """Content of the files of a text, in their order. Raises InputError for a file that is missing or cannot be read."""
    return {f"{number} {file.name}": _digest(file, place) for number, file in enumerate(list_files(data, place), 1)}


def _digest(file: TextFile, place: str) -> str:
    try:
        return sha256_of(file.path)
    except OSError as e:
        raise InputError(f"{place}.data: {file.path} cannot be read: {e.strerror or e}") from e


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What changed between two identities, a line a setting: `linkage: average -> single`."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}: {before} -> {after}"
