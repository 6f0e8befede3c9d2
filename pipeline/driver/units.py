"""A unit: the smallest thing that is scheduled, retried, sealed and resumed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.display.sizes import human_bytes


@dataclass(frozen=True)
class Hold:
    """What a worker opens once and keeps while it runs the units that need it: `call` is given `args`.

    run_dir, label: whose it is and how the log names it.
    """

    key: str
    call: str
    args: Mapping[str, Any]
    run_dir: str = ""
    label: str = ""


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

    kind: "input" (the user's to mend), "outside" (a full disk, a missing permission: the user's to mend, and not in the run
    file), "error" (ours), "passing" (a file server or store that was away; tried again after a pause), "lost" (its worker died
    or hung; tried again), "node" (its whole node died; tried again, and not held against the unit), "memory" (killed for
    memory; tried again alone). detail: the traceback of an "error", or what Ray says of a death.
    """

    kind: str
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a unit, where, and how long it took; `failure` is None for a sealed one.

    elapsed_s: of the unit alone. open_s: what opening a hold took since the worker's last unit, for this one or ahead of it.
    peak_bytes, gpu_peak_bytes: most memory that its process, and PyTorch on its GPU, had meanwhile (`pipeline.driver.memory`).
    bytes_read: of transient files, of the checkpoint, and of the checkpoint for a newly opened hold. bytes_written: of all its
    files.
    """

    host: str
    elapsed_s: float
    facts: Mapping[str, Any]
    failure: Failure | None = None
    bytes_read: int = 0
    bytes_written: int = 0
    open_s: float = 0.0
    peak_bytes: int = 0
    gpu_peak_bytes: int = 0


def costs(outcome: Outcome) -> str:
    """What a sealed unit took, for the log: `16,384 tokens, 4.1 s, peak 21 GB`."""
    parts = []
    if "num_tokens" in outcome.facts:
        parts.append(f"{outcome.facts['num_tokens']:,} tokens")
    if outcome.open_s >= 0.1:
        parts.append(f"layers loaded in {outcome.open_s:.1f} s")
    parts.append(f"{outcome.elapsed_s:.1f} s")
    if outcome.peak_bytes:
        parts.append(f"peak {human_bytes(outcome.peak_bytes)}")
    if outcome.gpu_peak_bytes:
        parts.append(f"GPU peak {human_bytes(outcome.gpu_peak_bytes)}")
    return ", ".join(parts)
