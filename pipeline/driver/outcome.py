"""Outcome of a unit: success or failure, place and cost."""

from dataclasses import dataclass

from rich import filesize

from stages.contracts.units import Facts


@dataclass(frozen=True)
class Failure:
    """Why a unit did not finish.

    kind: one of

    - "input": bad input that the user has to correct.
    - "outside": a problem outside the run file that the user has to correct, such as a full disk or a missing permission.
    - "error": a bug of this program.
    - "passing": a file server or store did not answer. The unit is retried after a pause.
    - "lost": the unit's worker died or hung. The unit is retried.
    - "node": the worker's whole node died. The unit is retried, and the attempt does not count against it.
    - "memory": the worker was killed because memory ran out. The unit is retried alone.

    detail: the traceback of an "error", or Ray's message on a death.
    """

    kind: str
    message: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a unit: where it ran, how long it took, and why it failed; `failure` is None for a sealed unit.

    elapsed_s: seconds of the unit alone. open_s: seconds spent on opening holds since the worker's last unit, whether for this
    unit or in advance. peak_bytes, gpu_peak_bytes: peak memory of the process and of PyTorch on its GPU during the unit
    (`pipeline.driver.memory`). bytes_read: bytes of transient files and of the checkpoint, including a newly opened hold.
    bytes_written: bytes of all files that the unit wrote.
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
    """Costs of a sealed unit for the log: `16,384 tokens, 4.1 s, peak 21 GB`."""
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
