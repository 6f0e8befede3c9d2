"""A unit: the smallest thing that is scheduled, retried, sealed and resumed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hold:
    """What a worker opens once and keeps while it runs the units that need it: `call` is given `args`."""

    key: str
    call: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Unit:
    """One call of a stage's function on files.

    run_dir: absolute path of the run directory. stage: the stage's name. stage_dir: its directory, relative to run_dir.
    name: unique in it, a readable path.
    call: "package.module:function". args: JSON values. label: how the log names it.
    reads, writes: transient files (relative to the run directory) that it consumes and makes. A unit follows the units that
    write what it reads; what it reads is deleted once it is sealed. A unit that writes transient files makes nothing else,
    and runs only when a reader needs it.
    after: ids of units that it also follows.
    hold: for units that share a loaded layer shard. on_worker: runs on a worker (GPU) rather than as a CPU task.
    memory_bytes: what it is estimated to need, for messages; 0 where that is little.
    """

    run_dir: str
    stage: str
    stage_dir: str
    name: str
    call: str
    args: Mapping[str, Any]
    label: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    hold: Hold | None = None
    on_worker: bool = False
    memory_bytes: int = 0

    @property
    def id(self) -> str:
        """Unique among all runs."""
        return f"{self.run_dir}/{self.stage_dir}/{self.name}"


@dataclass(frozen=True)
class Failure:
    """Why a unit did not finish.

    kind: "input" (the user's to mend), "outside" (what a file system or a store refuses), "error" (ours; `detail` holds the
    traceback), "lost" (its worker died or hung; tried again), "node" (its whole node died; tried again, and not held against
    the unit), "memory" (killed for memory; tried again alone).
    """

    kind: str
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a unit, where, and how long it took; `failure` is None for a sealed one.

    bytes_read: of transient files, of the checkpoint, and of the checkpoint for a newly opened hold. bytes_written: of all its
    files.
    """

    host: str
    elapsed_s: float
    facts: Mapping[str, Any]
    failure: Failure | None = None
    bytes_read: int = 0
    bytes_written: int = 0
