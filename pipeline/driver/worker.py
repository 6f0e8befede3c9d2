"""Runs units: finds the stage's function, keeps what units share, seals. The same code serves every executor."""

import gc
import importlib
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from pipeline.driver.memory import gpu_peak_bytes, peak_bytes, reset_peaks
from pipeline.driver.process import collection_paused, prepare_to_compute
from pipeline.driver.units import Failure, Hold, Outcome, Unit, costs
from pipeline.state import logs
from pipeline.state.manifest import seal
from stages.contracts.errors import InputError
from stages.contracts.units import Job
from stages.io.storage import as_path, is_passing, remedy_for


def resolve(call: str) -> Callable[..., Any]:
    """The function that "package.module:function" names."""
    module, _, name = call.partition(":")
    with collection_paused():
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


@runtime_checkable
class HeldLayers(Protocol):
    """A layer shard, as far as a worker knows it."""

    bytes_read: int

    def read_ahead(self, model: str, first: int, stop: int) -> None:
        """Have the files of layers [first, stop) of a model, which come next, read in the background."""

    def close(self) -> None:
        """Free all weights immediately. Models contain reference cycles: they would live until the garbage collector runs."""


class Worker:
    """One process's place of work: it holds at most one thing at a time."""

    def __init__(self, log_level: str = "info", has_own_process: bool = False) -> None:
        """has_own_process: it may say everything on standard error, and begin the process's memory peak anew for each unit."""
        logs.set_up(log_level, to_stderr=has_own_process)
        self._has_own_process = has_own_process
        prepare_to_compute()
        self._hold_key: str | None = None
        self._held: Any = None
        self._opened_bytes = 0
        self._open_s = 0.0
        self._has_left_overs = False

    def _hold(self, unit: Unit) -> Any:
        if unit.hold is not None or unit.on_worker:  # a CPU unit needs no room: keep what is held
            self._open(unit.hold)
        return self._held

    def _open(self, hold: Hold | None) -> None:
        key = hold.key if hold else None
        if key == self._hold_key:
            return
        self.let_go()  # before the next is loaded: both may not fit
        if hold is not None:
            self._has_left_overs = True
            started = time.time()
            log = logs.log_of(hold.run_dir)
            log.info("%s: loading", hold.label)
            with collection_paused():  # transformers imports a model's module when it builds one
                self._held = resolve(hold.call)(**hold.args)
            log.info("%s: loaded in %.1f s", hold.label, time.time() - started)
            self._has_left_overs = False
            self._opened_bytes += self._held.bytes_read if isinstance(self._held, HeldLayers) else 0
            self._open_s += time.time() - started
        self._hold_key = key

    def let_go(self) -> None:
        """Free the memory of what is held."""
        if isinstance(self._held, HeldLayers):
            self._held.close()
        self._hold_key, self._held = None, None
        if self._has_left_overs:  # of what could not be opened, which nobody can close
            gc.collect()
            self._has_left_overs = False

    def open_ahead(self, hold: Hold) -> None:
        """Open what the next units share before they come. An error here reaches nobody, and comes again with the first."""
        self._open(hold)

    def read_ahead(self, hold: Hold) -> None:
        """Have read what the next hold is opened from, while units of this one run. What is held knows how: both are layer
        shards, or nothing is done."""
        if isinstance(self._held, HeldLayers) and {"model", "first", "stop"} <= set(hold.args):
            self._held.read_ahead(hold.args["model"], hold.args["first"], hold.args["stop"])

    def run(self, unit: Unit) -> Outcome:
        """Run and seal one unit. Never raises for what the unit raises: the outcome says why it failed."""
        log, name = logs.log_of(unit.run_dir), f"{unit.stage} {unit.label}"
        log.info("%s: begins", name)
        if self._has_own_process:
            reset_peaks()
        started = begun = time.time()
        failure, facts, bytes_read, bytes_written, open_s = None, {}, 0, 0, 0.0
        try:
            run_dir = as_path(unit.run_dir)
            held = self._hold(unit)
            begun = time.time()
            bytes_read, self._opened_bytes = self._opened_bytes, 0
            open_s, self._open_s = self._open_s, 0.0
            bytes_read += sum((run_dir / path).stat().st_size for path in unit.reads)
            result = resolve(unit.call)(Job(run_dir, run_dir / unit.stage_dir, unit.args, held))
            seal(unit, result, started)
            bytes_read += result.bytes_read
            facts = dict(result.facts)
            bytes_written = sum(file.num_bytes for file in (*result.files, *result.transient))
        except Exception as e:  # nothing is swallowed: the driver reports it with its traceback and ends the run
            failure = _failure(e)
            log.error("%s: failed", name, exc_info=True)
        if failure is not None and failure.kind == "passing":
            self.let_go()  # open files may have gone stale for good
        outcome = Outcome(
            socket.gethostname(), time.time() - begun, facts, failure, bytes_read, bytes_written, open_s,
            peak_bytes(), gpu_peak_bytes(),
        )  # fmt: skip
        if failure is None:
            log.info("%s: sealed, %s", name, costs(outcome))
        return outcome


def _failure(error: Exception) -> Failure:
    """Why a unit did not finish (see `Failure` for the kinds)."""
    text = f"{type(error).__name__}: {error}"
    if is_passing(error):  # before anything that was made of it
        return Failure("passing", text)
    if isinstance(error, InputError):
        return Failure("input", str(error))
    if (remedy := remedy_for(error)) is not None:
        return Failure("outside", f"{error}; {remedy}")
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return Failure("memory" if is_memory else "error", text, traceback.format_exc())
