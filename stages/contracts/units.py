"""What a unit of work is given and what it returns: facts and file names, never arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.io.files import WrittenFile


@dataclass(frozen=True)
class Job:
    """One unit's inputs.

    run_dir: the run directory, on storage that every node reaches.
    stage_dir: the stage's own directory inside it; a unit writes only below it.
    args: settings and file names, JSON values.
    held: what the worker keeps between units of one hold (a loaded layer shard), or None.
    """

    run_dir: Path
    stage_dir: Path
    args: Mapping[str, Any]
    held: Any = None


@dataclass(frozen=True)
class UnitResult:
    """What a unit did.

    files: what it wrote and what its seal vouches for.
    transient: what it wrote for the units after it, deleted once they are sealed.
    facts: counts and seconds for the log and the report, JSON values.
    bytes_read: of the checkpoint, for the metrics; what a hold reads counts with the hold.
    """

    files: tuple[WrittenFile, ...] = ()
    transient: tuple[WrittenFile, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    bytes_read: int = 0
