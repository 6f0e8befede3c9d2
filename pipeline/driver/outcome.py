"""What became of a unit."""

from dataclasses import dataclass

from rich import filesize

from stages.contracts.units import Facts


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
    facts: Facts
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
        parts.append(f"peak {filesize.decimal(outcome.peak_bytes)}")
    if outcome.gpu_peak_bytes:
        parts.append(f"GPU peak {filesize.decimal(outcome.gpu_peak_bytes)}")
    return ", ".join(parts)
