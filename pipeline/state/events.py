"""`events.jsonl`: what happened in a run directory, one JSON object a line, for people and dashboards.

An object cannot be appended to: on object storage the log is a folder `events/` of such files, in the order of their names.
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
    """Appends events. It is a log: whether work is done is read from manifests only.

    On object storage events are sent every FLUSH_S, so a driver that is killed takes the last ones along.
    """

    def __init__(self, run_dir: Path, check: Callable[[], None]) -> None:
        """check: called before each write; raises LockLost when it must not be."""
        self._path, self._check = run_dir / EVENTS_FILE, check
        self._parts = _Parts(run_dir / EVENTS_DIR, check) if is_remote(run_dir) else None

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time in seconds since 1970; fields that are None are left out."""
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
    """Names of files may hold what is no text (lone surrogates), which no JSON reader takes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


class _Parts:
    """Objects of a bounded size; the newest is written anew as it grows."""

    def __init__(self, folder: Path, check: Callable[[], None]) -> None:
        self._folder, self._check = folder, check
        self._name = self._new_name()
        self._lines: list[str] = []
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def _new_name(self) -> str:
        return f"{time.time_ns():020d}.jsonl"

    def append(self, line: str, is_urgent: bool) -> None:
        """Keep a line, and see that it is sent."""
        with self._lock:
            self._lines.append(line)
            if self._timer is None and not is_urgent:
                self._timer = threading.Timer(FLUSH_S, self._send_in_time)
                self._timer.daemon = True
                self._timer.start()
        if is_urgent:
            self._send()

    def _send_in_time(self) -> None:
        with contextlib.suppress(LockLost):  # the driver is told at its next act
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
    """One event as it is read again; what a kind of event does not have is empty."""

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
    """What the log knows of the last run, units by their path in the run directory.

    running: when they were started (seconds since 1970). failed: their last event. reused: units by stage. num_lost: how often
    a unit had to be tried again. is_over: whether the driver has ended as it should. num_unreadable: lines of the whole log
    that are no events, such as one that a killed driver has left half written.
    """

    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, Event] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    num_lost: int = 0
    is_over: bool = False
    num_unreadable: int = 0


def _lines(run_dir: Path) -> Iterator[bytes]:
    """All lines of the log, cut where they are longer than any event. Raises InputError if the log is no regular file."""
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
    """All events; None for a line that is none."""
    for line in _lines(run_dir):
        try:
            yield Event.model_validate_json(line)
        except ValidationError:
            yield None


def last_run(run_dir: Path) -> LastRun:
    """What the log tells of the last run; nothing if there was none."""
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
