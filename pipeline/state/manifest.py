"""Manifests: the seal of a unit, written last by the process that ran it.
Whether a unit is done is read from manifests only."""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, JsonValue, TypeAdapter, ValidationError

from stages.contracts.errors import InputError
from stages.contracts.units import Facts, Unit, UnitResult
from stages.io.files import WrittenFile, sha256_of, write_json
from stages.io.storage import as_path
from stages.io.untrusted import check_regular, read_small

MANIFESTS_DIR = "manifests"


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of a file, as recorded in a seal."""

    bytes: Annotated[int, Field(ge=0, lt=1 << 63)]
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A sealed unit: its stage directory and name, the files it wrote (paths relative to the run directory, sizes, digests),
    its facts, and the process and time of the run."""

    unit: str
    files: dict[str, FileRecord]
    transient: dict[str, FileRecord]
    facts: dict[str, JsonValue]
    host: str
    started: float
    elapsed_s: float

    def is_whole(self, unit: Unit, verify: bool) -> bool:
        """Whether all files exist with the recorded sizes. verify: compare the recorded digests too."""
        return all(_is_whole(as_path(unit.run_dir) / path, recorded, verify) for path, recorded in self.files.items())

    def has_transient(self, unit: Unit, path: str, verify: bool) -> bool:
        """Whether one transient file exists with the recorded size. verify: compare the recorded digest too."""
        return path in self.transient and _is_whole(as_path(unit.run_dir) / path, self.transient[path], verify)


_MANIFEST = TypeAdapter(Manifest)


def _name(unit: Unit) -> str:
    return f"{unit.part_dir}/{unit.name}"


def _is_whole(path: Path, recorded: FileRecord, verify: bool) -> bool:
    try:
        check_regular(path)
        if path.stat().st_size != recorded.bytes:
            return False
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: not a regular file, or an impossible path
        return False
    return not verify or sha256_of(path) == recorded.sha256


def manifest_path(unit: Unit) -> Path:
    """Path of a unit's manifest."""
    return as_path(unit.run_dir) / unit.part_dir / MANIFESTS_DIR / f"{unit.name}.json"


def _records(run_dir: Path, files: Sequence[WrittenFile]) -> dict[str, dict[str, JsonValue]]:
    return {file.path.relative_to(run_dir).as_posix(): {"bytes": file.num_bytes, "sha256": file.sha256} for file in files}


def facts_of(result: UnitResult[object]) -> Facts:
    """Facts of a result as JSON values."""
    return TypeAdapter[object](type(result.facts)).dump_python(result.facts, mode="json")  # type: ignore[no-any-return]


def seal(unit: Unit, result: UnitResult[object], started: float) -> Facts:
    """Write a unit's manifest. Returns the facts in it."""
    run_dir, facts = as_path(unit.run_dir), facts_of(result)
    manifest = {
        "unit": _name(unit),
        "files": _records(run_dir, result.files),
        "transient": _records(run_dir, result.transient),
        "facts": facts,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": started,
        "elapsed_s": time.time() - started,
    }
    write_json(manifest_path(unit), manifest)
    return facts


def read_manifest(unit: Unit) -> Manifest | None:
    """A unit's manifest, or None if the unit is not sealed.
    A damaged manifest counts as none, because seals are written whole."""
    try:
        manifest = _MANIFEST.validate_json(read_small(manifest_path(unit)))
    except (FileNotFoundError, NotADirectoryError, InputError, ValidationError):
        return None
    return manifest if manifest.unit == _name(unit) else None
