"""Log files: one per process in `logs/` of the run directory. Ray workers also log to standard error.

Object storage cannot append to an object. Runs on object storage log to standard error only, which Ray keeps for each worker.
"""

import logging
import os
import re
import socket
import sys
from pathlib import Path

from pipeline.run.owned import is_unlinked_folder
from stages.io.storage import is_remote, is_url

LOGS_DIR = "logs"
_MAX_BYTES = 8_000_000
_MAX_FILES = 100
_LOGGER = logging.getLogger("hcsmoe")
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def set_up(level: str, to_stderr: bool) -> None:
    """Set up logging from this level on, to files in run directories and, if asked, to standard error."""
    handlers: list[logging.Handler] = [_RunFiles()]
    if to_stderr:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
    _LOGGER.handlers = handlers
    _LOGGER.propagate = False
    _LOGGER.setLevel(level.upper())


def log_of(run_dir: str | Path) -> logging.LoggerAdapter[logging.Logger]:
    """Logger of this process for a run directory."""
    return logging.LoggerAdapter(_LOGGER, {"run_dir": str(run_dir)})


def file_name() -> str:
    """File name of this process's log."""
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', socket.gethostname())[:100]}-{os.getpid()}.log"


def prune(run_dir: Path) -> None:
    """Delete all but the newest logs. Called while no worker of the run is up, so no process still writes to a deleted log."""
    folder = run_dir / LOGS_DIR
    if is_remote(run_dir) or not is_unlinked_folder(folder):
        return
    files = sorted(folder.glob("*.log*"), key=lambda path: path.lstat().st_mtime)
    for path in files[:-_MAX_FILES]:
        path.unlink(missing_ok=True)


def _open(path: str, flags: int) -> int:
    """Open a file without following links or blocking on a pipe. Anybody with write access may have put either there."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


class _RunFiles(logging.Handler):
    """Appends each record to the log of its run directory. Files are not kept open, because a worker serves any number of runs.

    A full file is renamed and replaces the previous one. A log that cannot be written stops no unit; one warning is printed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._has_complained = False

    def emit(self, record: logging.LogRecord) -> None:
        run_dir = getattr(record, "run_dir", "")
        if not run_dir or is_url(run_dir):
            return
        path = Path(run_dir, LOGS_DIR, file_name())
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "a", encoding="utf-8", errors="backslashreplace", opener=_open) as out:
                out.write(self.format(record) + "\n")
                is_full = out.tell() > _MAX_BYTES
            if is_full:
                os.replace(path, path.with_name(f"{path.name}.1"))
        except OSError as e:
            if not self._has_complained:
                print(f"cannot write the log {path}: {e}", file=sys.stderr)
            self._has_complained = True
