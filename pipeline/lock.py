"""One driver a run directory: a lock file that names its holder and is kept fresh while the holder lives."""

import contextlib
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from pipeline.lock_content import Holder, read_holder
from pipeline.lock_files import LocalLockFile, LockFile, ObjectLockFile
from stages.common.errors import InputError
from stages.common.storage import failures, is_remote

LOCK_FILE = "driver.lock"
HEARTBEAT_S = 10.0
STALE_S = 60.0


def describe_holder(run_dir: Path) -> str:
    """One line that says which driver works on a run directory, and if it shows no sign of life."""
    path = run_dir / LOCK_FILE
    try:
        holder = read_holder(path)
        silent_s = time.time() - path.stat().st_mtime  # by this host's clock: good enough to look at
    except InputError as e:
        return f"{run_dir}: {e}"
    except FileNotFoundError:
        holder = None
    if holder is None:
        return f"{run_dir}: no driver is running"
    line = f"{run_dir}: driver on {holder}"
    if _is_gone(holder):
        return f"{line}; that process is gone, and the next run takes over"
    if _is_fresh(silent_s):
        return line
    silence = f"no sign of life for {silent_s:.0f} s" if silent_s > 0 else f"its last sign of life is {-silent_s:.0f} s ahead"
    return f"{line}; {silence}, and the next run takes over"


def _is_fresh(age_s: float) -> bool:
    """Whether a living holder may have set a time that long ago. Each sign of life sets the present time, so a time that is
    far ahead comes from a clock that was wrong, and no holder has lived since."""
    return abs(age_s) < STALE_S


def _is_gone(holder: Holder) -> bool:
    """Whether a lock's process, of this host, has ended; other hosts' processes cannot be seen."""
    if holder.host != socket.gethostname():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, and alive
        pass
    return False


class RunLock:
    """Holds the lock of a run directory while entered.

    Raises InputError naming the holder if another driver is alive, or if the lock file is damaged. A lock is stale when its
    process is gone from this host, or when it has not been refreshed for STALE_S; it is then taken over, and `took_over` says
    from whom.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._token = uuid.uuid4().hex
        make = ObjectLockFile if is_remote(run_dir) else LocalLockFile
        self._file: LockFile = make(run_dir / LOCK_FILE, self._token)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.took_over: str | None = None

    def __enter__(self) -> "RunLock":
        content = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z"), self._token)
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
            self._file.take_away(holder.token, STALE_S)  # whoever removes it, another may be the first to make it anew
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(InputError):  # damaged meanwhile: the next driver says how to remove it
            holder = self._file.read()
            if holder is not None and holder.token == self._token:
                self._file.remove()

    def _is_alive(self, holder: Holder) -> bool:
        if _is_gone(holder):
            return False
        try:
            return _is_fresh(self._file.age_s())
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(InputError, *failures()):  # a beat that does not arrive is made up for by the next
                self._file.refresh()
