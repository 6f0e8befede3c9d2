"""`events.jsonl`: log of events in a run directory, one JSON object per line, for people and dashboards.

Object storage cannot append to an object. There the log is a folder `events/` of such files, ordered by name.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import LockLost
from stages.io.files import write_bytes
from stages.io.storage import is_remote
from stages.io.untrusted import check_regular, read_small

EVENTS_FILE = "events.jsonl"
EVENTS_DIR = "events"
FLUSH_S = 2.0
PART_CHARACTERS = 1 << 18
_MAX_LINE_BYTES = 1 << 20
RUN_BEGINS, RUN_ENDS, STAGE_BEGINS = "run begins", "run ends", "stage begins"
STARTED, SEALED, LOST, FAILED = "started", "sealed", "lost", "failed"


class EventLog:
    """Appends events. The log is for information: whether a unit is done is read from manifests only.

    On object storage events are sent every FLUSH_S, so a killed driver loses its latest ones.
    """

    def __init__(self, run_dir: Path, check: Callable[[], None]) -> None:
        """check: called before each write; raises LockLost when nothing more may be written."""
        self._path, self._check = run_dir / EVENTS_FILE, check
        self._parts = _Parts(run_dir / EVENTS_DIR, check) if is_remote(run_dir) else None

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time in seconds since 1970. Fields that are None are left out."""
        record = {"time": round(time.time(), 3), "event": event}
        record |= {name: _encodable(value) for name, value in fields.items() if value is not None}
        line = json.dumps(record, ensure_ascii=False) + "\n"
        if self._parts is not None:
            self._parts.append(line, is_urgent=event in (RUN_BEGINS, RUN_ENDS))
            return
        self._check()
        with open(self._path, "a", encoding="utf-8") as out:
            out.write(line)


def _encodable(value: Any) -> Any:
    """Replace lone surrogates, which file names may contain and JSON readers reject."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class _Parts:
    """Log objects of bounded size. The newest object is rewritten as it grows."""

    def __init__(self, folder: Path, check: Callable[[], None]) -> None:
        self._folder, self._check = folder, check
        self._name = self._new_name()
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def _new_name(self) -> str:
        return f"{time.time_ns():020d}.jsonl"

    def append(self, line: str, is_urgent: bool) -> None:
        """Buffer a line and make sure that it is sent within FLUSH_S. is_urgent: send it now."""
        with self._lock:
            self._lines.append(line)
            if self._timer is None and not is_urgent:
                self._timer = threading.Timer(FLUSH_S, self._send_in_time)
                self._timer.daemon = True
                self._timer.start()
        if is_urgent:
            self._send()

    def _send_in_time(self) -> None:
        with contextlib.suppress(LockLost):  # the driver learns of it at its next check
            self._send()

    def _send(self) -> None:
        self._check()
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            write_bytes(self._folder / self._name, "".join(self._lines).encode())
            if sum(map(len, self._lines)) > PART_CHARACTERS:
                self._name, self._lines = self._new_name(), []


class Event(BaseModel):
    """One parsed event. Fields that a kind of event does not have are empty."""

    model_config = ConfigDict(frozen=True, strict=True)

    time: Annotated[float, Field(ge=0, le=1e11)]
    event: str
    unit: str = ""
    stage: str = ""
    num_reused: int = 0
    host: str = ""
    message: str = ""


@dataclass
class LastRun:
    """Facts about the last run, taken from the log. Units are given by their path in the run directory.

    running: start times in seconds since 1970. failed: last event of each failed unit. reused: number of units by stage.
    num_lost: number of times a unit had to be retried. is_over: whether the driver ended normally. num_unreadable: lines of the
    whole log that are not events, such as a line that a killed driver left half written.
    """

    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, Event] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    num_lost: int = 0
    is_over: bool = False
    num_unreadable: int = 0


def _lines(run_dir: Path) -> Iterator[bytes]:
    """All lines of the log, cut at the length of the longest event. Raises InputError if the log is not a regular file."""
    if is_remote(run_dir):
        for path in sorted((run_dir / EVENTS_DIR).glob("*.jsonl"), key=str):
            yield from read_small(path).splitlines()
        return
    path = run_dir / EVENTS_FILE
    try:
        check_regular(path)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as lines:
            while line := lines.readline(_MAX_LINE_BYTES):
                yield line
    except FileNotFoundError:
        return


def _events(run_dir: Path) -> Iterator[Event | None]:
    """All events; None for a line that is not an event."""
    for line in _lines(run_dir):
        try:
            yield Event.model_validate_json(line)
        except ValidationError:
            yield None


def last_run(run_dir: Path) -> LastRun:
    """Facts about the last run; empty if there was none."""
    found, num_unreadable = LastRun(), 0
    for event in _events(run_dir):
        if event is None:
            num_unreadable += 1
        elif event.event == RUN_BEGINS:
            found = LastRun()
        elif event.event == RUN_ENDS:
            found.is_over = True
        elif event.event == STAGE_BEGINS:
            found.reused[event.stage] = event.num_reused
        elif event.event == STARTED:
            found.running[event.unit] = event.time
        else:
            found.running.pop(event.unit, None)
            found.num_lost += event.event == LOST
            if event.event == FAILED:
                found.failed[event.unit] = event
    found.num_unreadable = num_unreadable
    return found
