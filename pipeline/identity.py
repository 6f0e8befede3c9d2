"""Keys: what a result depends on, hashed. Equal keys mean equal results; a changed key can be explained as a diff."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stages.common.checkpoint import CONFIG_FILE, INDEX_FILE, Checkpoint
from stages.common.errors import InputError
from stages.common.files import sha256_of
from stages.common.storage import is_url, read_range

KEY_LENGTH = 12
_END_BYTES = 1 << 16


def key_of(identity: Mapping[str, Any]) -> str:
    """Shortened SHA-256 of the canonical JSON of an identity."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def model_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """The root: content of config, index and side files, and of each weight file its size and the digest of both its ends.

    Reading 94 GB to know that they are unchanged would cost more than the work saved; a header and the ends of the data
    change whenever a checkpoint is trained on or written anew.
    """
    small = [checkpoint.folder / CONFIG_FILE, *checkpoint.side_files()]
    if (checkpoint.folder / INDEX_FILE).exists():
        small.append(checkpoint.folder / INDEX_FILE)
    return {
        "files": {path.name: sha256_of(path) for path in small},
        "weights": {name: _ends(checkpoint.folder / name) for name in checkpoint.files},
    }


def _ends(path: Path) -> str:
    try:
        size = path.stat().st_size
        ends = read_range(path, 0, _END_BYTES) + read_range(path, max(0, size - _END_BYTES), _END_BYTES)
        return f"{size}:{hashlib.sha256(ends).hexdigest()}"
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}; the checkpoint is incomplete") from e


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
