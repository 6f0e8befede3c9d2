"""Allows one driver per run directory, by a lock file that names its holder and is refreshed while the holder lives."""

import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline.errors import LockLost
from pipeline.state.liveness import describe_process, is_gone
from pipeline.state.lock_content import Holder, read_holder
from pipeline.state.lock_files import LocalLockFile, LockFile, ObjectLockFile
from stages.contracts.errors import InputError
from stages.io.storage import failures, is_passing, is_remote

LOCK_FILE = "driver.lock"
HEARTBEAT_S = 10.0
STALE_S = 60.0


def describe_holder(run_dir: Path) -> str:
    """One line that names the driver working on a run directory, and says if the driver shows no sign of life."""
    path = run_dir / LOCK_FILE
    try:
        holder = read_holder(path)
        silent_s = time.time() - path.stat().st_mtime  # uses this host's clock, which is accurate enough for display
    except InputError as e:
        return f"{run_dir}: {e}"
    except FileNotFoundError:
        holder = None
    if holder is None:
        return f"{run_dir}: no driver is running"
    line = f"{run_dir}: driver on {holder}"
    if is_gone(asdict(holder)):
        return f"{line}; that process is gone, and the next run takes over"
    if _is_fresh(silent_s):
        return line
    silence = f"no sign of life for {silent_s:.0f} s" if silent_s > 0 else f"its last sign of life is {-silent_s:.0f} s ahead"
    return f"{line}; {silence}, and the next run takes over"


def _is_fresh(age_s: float) -> bool:
    """Whether a living holder can have written a time stamp of this age. Every refresh sets the present time. So a time stamp
    far in the future comes from a clock that was wrong, and no holder has refreshed it since."""
    return abs(age_s) < STALE_S


class RunLock:
    """Holds the lock of a run directory inside its context.

    Raises InputError that names the holder if another driver is alive, or if the lock file is damaged. A lock is stale when its
    process is known to be gone, or when it was not refreshed for STALE_S. A stale lock is taken over, and `took_over` names the
    former holder.

    A holder that was suspended for longer than STALE_S (a closed laptop, a paused machine) may have lost the lock when it
    resumes. It therefore calls `check` before every change to the run directory. Two gaps remain: the moment between a check
    and the change, and units that its workers are running. Such a unit may still seal its files. That is harmless, because a
    unit is a function of files and settings, so the new holder's unit writes the same bytes. Or it may fail because the new
    holder deletes temporary files and inputs. Nobody sees that failure, since its driver has stopped.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._token = uuid.uuid4().hex
        make = ObjectLockFile if is_remote(run_dir) else LocalLockFile
        self._file: LockFile = make(run_dir / LOCK_FILE, self._token)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._refreshing = threading.Lock()
        self._fresh_at = self._read_at = 0.0
        self._lost: str | None = None
        self.took_over: str | None = None

    def __enter__(self) -> "RunLock":
        since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        content = Holder(**describe_process(), since=since, token=self._token)
        self._fresh_at = _clock()
        while not self._file.create(content):
            holder = self._file.read()
            if holder is None:
                continue
            if self._is_alive(holder):
                raise InputError(
                    f"{self._run_dir} is in use by another driver: {holder}; wait for it or end it "
                    f"(its lock is stale {STALE_S:.0f} s after its host dies)"
                )
            self.took_over = str(holder)
            self._file.take_away(holder.token, STALE_S)  # then any waiting driver may create the new one
            self._fresh_at = _clock()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._lost is None:
            # the file may be damaged (the next driver says how to remove it), or gone with the whole run directory
            with contextlib.suppress(InputError, FileNotFoundError):
                self._file.take_away(self._token, STALE_S)

    def _is_alive(self, holder: Holder) -> bool:
        if is_gone(asdict(holder)):
            return False
        try:
            return _is_fresh(self._file.age_s())
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raise LockLost unless this driver holds the lock now. Call it before every change to the run directory."""
        if self._lost is None:
            self._look()
        if self._lost is not None:
            raise LockLost(
                f"lost the lock of {self._run_dir}{self._lost}; nothing more is written; run the same command again "
                "when no other driver runs here"
            )

    def _look(self) -> None:
        now = _clock()
        if not self._thread.is_alive():
            self._lost = ": its heartbeat has ended with the error above"
        elif now - self._fresh_at > STALE_S / 2:  # suspended, or many refreshes failed: the lock may be lost
            self._refresh()
        elif now - self._read_at >= self._file.read_every_s:
            with contextlib.suppress(*failures()):  # a failed read is harmless: nobody takes over a fresh lock
                self._judge(self._file.read)
                self._read_at = now

    def _beat(self) -> None:
        while self._lost is None and not self._stop.wait(HEARTBEAT_S):
            self._refresh()

    def _refresh(self) -> None:
        """Refresh the lock, or find that it is lost.
        After a failure that may pass, the next beats retry until STALE_S is over."""
        if not self._refreshing.acquire(timeout=STALE_S):
            self._lost = f": it could not be refreshed for {STALE_S:.0f} s (the storage does not answer)"
            return
        try:
            if not self._try_to_refresh():  # a store may refuse its own repeated write, so try again
                self._try_to_refresh(is_last=True)
        finally:
            self._refreshing.release()

    def _try_to_refresh(self, is_last: bool = False) -> bool:
        now = _clock()
        try:
            self._judge(self._file.refresh)
            self._fresh_at = now
        except failures() as e:
            if not is_passing(e):
                if is_last:
                    self._lost = f": it cannot be refreshed ({type(e).__name__}: {e})"
                return False
            if _clock() - self._fresh_at > STALE_S:
                self._lost = f": it could not be refreshed for {STALE_S:.0f} s ({type(e).__name__}: {e})"
        return True

    def _judge(self, read: Callable[[], Holder | None]) -> None:
        """Read the holder and set `_lost` unless it is this driver."""
        try:
            holder = read()
        except InputError as e:
            self._lost = f": {e}"
            return
        if holder is None:
            self._lost = ": its file is gone (another driver took over and has ended, or somebody removed it)"
        elif holder.token != self._token:
            self._lost = f" to {holder}"


def _clock() -> float:
    """Monotonic seconds. Time during which the machine was suspended counts where the system supports that."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
