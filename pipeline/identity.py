"""Keys: what a result depends on, hashed. Equal keys mean equal results; a changed key can be explained as a diff."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.weights_identity import weights_identity
from stages.common.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from stages.common.errors import InputError
from stages.common.files import sha256_of
from stages.common.storage import is_url

KEY_LENGTH = 12


def key_of(identity: Mapping[str, Any]) -> str:
    """Shortened SHA-256 of the canonical JSON of an identity."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def model_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """The root: content of config, index and side files, and a digest for each weight file (see `weights_identity`)."""
    small = [checkpoint.folder / CONFIG_FILE, *checkpoint.side_files()]
    if checkpoint.index:
        small.append(checkpoint.folder / INDEX_FILE)
    return {"files": {path.name: sha256_of(path) for path in small}, "weights": weights_identity(checkpoint)}


def data_identity(data: tuple[str, ...], revision: str | None, place: str) -> dict[str, str]:
    """Content of the files of a text, in their order, or name and revision of a hub dataset.

    Raises InputError for a missing file.
    """
    identity = {}
    for number, name in enumerate(data, 1):
        path = Path(name)
        if path.is_file():
            identity[f"{number} {path.name}"] = sha256_of(path)
        elif is_url(name):
            raise InputError(f"{place}.data: {name} is a URL; texts are read from files that every node reaches: copy it")
        elif path.suffix or name.count("/") != 1:
            raise InputError(f"{place}.data: {name} does not exist; give a file, or a dataset of the hub as org/name[:split]")
        else:
            identity[name] = f"hub:{revision or 'main'}"
    return identity


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What changed between two identities, a line a setting: `linkage: average -> single`."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}: {before} -> {after}"
