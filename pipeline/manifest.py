"""Manifests: the seal of a unit, written last, by whoever ran it. Whether work is done is read from here only."""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.units import Unit
from stages.common.files import WrittenFile, sha256_of, write_json
from stages.common.storage import as_path
from stages.common.unit import UnitResult

MANIFESTS_DIR = "manifests"


@dataclass(frozen=True)
class Manifest:
    """A sealed unit: what it wrote (paths relative to the run directory, size, digest), its facts, and by whom and when."""

    files: Mapping[str, Mapping[str, Any]]
    transient: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]
    host: str
    started: float
    elapsed_s: float

    def is_whole(self, unit: Unit, verify: bool) -> bool:
        """Whether the files are there with the recorded sizes, and under `verify` with the recorded digests."""
        return all(_is_whole(as_path(unit.run_dir) / path, recorded, verify) for path, recorded in self.files.items())

    def has_transient(self, unit: Unit, path: str, verify: bool) -> bool:
        """The same for one transient file."""
        return path in self.transient and _is_whole(as_path(unit.run_dir) / path, self.transient[path], verify)


def _is_whole(path: Path, recorded: Mapping[str, Any], verify: bool) -> bool:
    try:
        if path.stat().st_size != recorded["bytes"]:
            return False
    except FileNotFoundError:
        return False
    return not verify or sha256_of(path) == recorded["sha256"]


def manifest_path(unit: Unit) -> Path:
    """Where a unit's manifest lies."""
    return as_path(unit.run_dir) / unit.stage_dir / MANIFESTS_DIR / f"{unit.name}.json"


def _records(run_dir: Path, files: tuple[WrittenFile, ...]) -> dict[str, dict[str, Any]]:
    return {file.path.relative_to(run_dir).as_posix(): {"bytes": file.num_bytes, "sha256": file.sha256} for file in files}


def seal(unit: Unit, result: UnitResult, started: float) -> None:
    """Write a unit's manifest."""
    run_dir = as_path(unit.run_dir)
    manifest = {
        "unit": f"{unit.stage_dir}/{unit.name}",
        "files": _records(run_dir, result.files),
        "transient": _records(run_dir, result.transient),
        "facts": dict(result.facts),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": started,
        "elapsed_s": time.time() - started,
    }
    write_json(manifest_path(unit), manifest)


def read_manifest(unit: Unit) -> Manifest | None:
    """A unit's manifest, or None if it is not sealed. A damaged manifest (they are written whole) seals nothing."""
    try:
        value = json.loads(manifest_path(unit).read_text())
        return Manifest(
            **{key: value[key] for key in ("files", "transient", "facts", "host", "started", "elapsed_s")},
        )
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        return None
