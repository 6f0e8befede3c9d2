"""Runs units: imports the stage's function, keeps the hold that units share, writes the seal. Every executor uses this code."""

import gc
import socket
import time
import traceback

from pipeline.driver.memory import gpu_peak_bytes, peak_bytes, reset_peaks
from pipeline.driver.outcome import Failure, Outcome, costs
from pipeline.driver.process import collection_paused, prepare_to_compute
from pipeline.imports import resolve
from pipeline.state import logs
from pipeline.state.manifest import seal
from stages.contracts.errors import InputError
from stages.contracts.units import Call, Facts, Held, HeldJob, Hold, Job, Unit, UnitResult
from stages.io.storage import as_path, is_passing, remedy_for


class Worker:
    """Runs units in one process. It keeps at most one hold open at a time."""

    def __init__(self, log_level: str = "info", has_own_process: bool = False) -> None:
        """has_own_process: log to standard error too, and reset the process's memory peak before each unit."""
        logs.set_up(log_level, to_stderr=has_own_process)
        self._has_own_process = has_own_process
        prepare_to_compute()
        self._hold_key: str | None = None
        self._hold_call: Call | None = None
        self._held: Held | None = None
        self._opened_bytes = 0
        self._open_s = 0.0
        self._has_failed_open = False

    def _job(self, unit: Unit) -> Job[object]:
        """The argument of the unit's function. Opens the unit's hold first."""
        if unit.hold is not None or unit.on_worker:  # a CPU unit needs little memory, so the open hold may stay
            self._open(unit.hold)
        run_dir = as_path(unit.run_dir)
        if unit.hold is None:
            return Job(run_dir, run_dir / unit.part_dir, unit.call.args)
        return HeldJob(run_dir, run_dir / unit.part_dir, unit.call.args, self._held)

    def _open(self, hold: Hold | None) -> None:
        key = hold.key if hold else None
        if key == self._hold_key:
            return
        if hold is not None and hold.call == self._hold_call:  # another lane of the same work
            self._hold_key = key
            return
        self.close()  # close the old hold before opening the next: both may not fit in memory
        if hold is not None:
            self._has_failed_open = True
            started = time.time()
            log = logs.log_of(hold.run_dir)
            log.info("%s: loading", hold.label)
            with collection_paused():  # transformers imports a model's module when it builds one
                held = resolve(hold.call.function)(hold.call.args)
            log.info("%s: loaded in %.1f s", hold.label, time.time() - started)
            self._has_failed_open = False
            assert isinstance(held, Held), hold.call.function
            self._held, self._hold_call = held, hold.call
            self._opened_bytes += held.bytes_read
            self._open_s += time.time() - started
        self._hold_key = key

    def close(self) -> None:
        """Close the hold and free its memory."""
        if self._held is not None:
            self._held.close()
        self._hold_key, self._hold_call, self._held = None, None, None
        if self._has_failed_open:  # a failed open leaves objects without an owner
            gc.collect()
            self._has_failed_open = False

    def open_ahead(self, hold: Hold) -> None:
        """Open the hold of the next units in advance.
        An error is not reported here: the first unit opens the hold again and meets it."""
        self._open(hold)

    def read_ahead(self, hold: Hold) -> None:
        """Start to read the files of the next hold while units of the current one run."""
        if self._held is not None:
            self._held.read_ahead(hold.call.args)

    def run(self, unit: Unit) -> Outcome:
        """Run and seal one unit. Exceptions of the unit are not raised: the outcome states why it failed."""
        log, name = logs.log_of(unit.run_dir), f"{unit.stage} {unit.label}"
        log.info("%s: begins", name)
        if self._has_own_process:
            reset_peaks()
        started = begun = time.time()
        failure, bytes_read, bytes_written, open_s = None, 0, 0, 0.0
        facts: Facts = {}
        try:
            job = self._job(unit)
            begun = time.time()
            bytes_read, self._opened_bytes = self._opened_bytes, 0
            open_s, self._open_s = self._open_s, 0.0
            bytes_read += sum((job.run_dir / path).stat().st_size for path in unit.reads)
            result = resolve(unit.call.function)(job)
            assert isinstance(result, UnitResult), unit.call.function
            facts = seal(unit, result, started)
            bytes_read += result.bytes_read
            bytes_written = sum(file.num_bytes for file in (*result.files, *result.transient))
        except Exception as e:  # the edge of a unit: the driver reports it with its traceback and ends the run
            failure = _failure(e)
            log.error("%s: failed", name, exc_info=True)
        if failure is not None and failure.kind == "passing":
            self.close()  # open file handles may stay stale after a server failure
        outcome = Outcome(
            socket.gethostname(), time.time() - begun, facts, failure, bytes_read, bytes_written, open_s,
            peak_bytes(), gpu_peak_bytes(),
        )  # fmt: skip
        if failure is None:
            log.info("%s: sealed, %s", name, costs(outcome))
        return outcome


def _failure(error: Exception) -> Failure:
    """Classify the error of a unit, by the kinds of `Failure`."""
    text = f"{type(error).__name__}: {error}"
    if is_passing(error):  # first, because the error may be wrapped in one of the types below
        return Failure("passing", text)
    if isinstance(error, InputError):
        return Failure("input", str(error))
    if (remedy := remedy_for(error)) is not None:
        return Failure("outside", f"{error}; {remedy}")
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return Failure("memory" if is_memory else "error", text, traceback.format_exc())
