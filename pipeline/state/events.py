"""Writes the log of a run's events (`stages.contracts.events`), and reads from it what the last run did."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import LockLost
from stages.contracts.events import (
    EVENTS_DIR,
    EVENTS_FILE,
    FAILED,
    LOST,
    RUN_BEGINS,
    RUN_ENDS,
    STAGE_BEGINS,
    STARTED,
    Event,
    parse_events,
    read_events,
)
from stages.io.files import named, write_bytes
from stages.io.storage import is_remote
from stages.io.untrusted import check_regular

FLUSH_S = 2.0
PART_CHARACTERS = 1 << 18
_MAX_READ_BYTES = 1 << 24


class EventLog:
    """Appends events. The log is for information: whether a unit is done is read from manifests only.

    On object storage events are sent every FLUSH_S, so a killed driver loses its latest ones.
    """

    def __init__(self, run_dir: Path, check: Callable[[], None]) -> None:
        """check: called before each write; raises LockLost when nothing more may be written."""
        self._path, self._check = run_dir / EVENTS_FILE, check
        self._parts = _Parts(run_dir / EVENTS_DIR, check) if is_remote(run_dir) else None

    def write(self, event: Event) -> None:
        """Append one event. Fields with default values are left out."""
        line = json.dumps(event.model_dump(exclude_defaults=True), ensure_ascii=False) + "\n"
        if self._parts is not None:
            self._parts.append(line, is_urgent=event.event in (RUN_BEGINS, RUN_ENDS))
            return
        self._check()
        with named(self._path), open(self._path, "a", encoding="utf-8") as out:
            out.write(line)


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


def last_run(run_dir: Path) -> LastRun:
    """Facts about the last run; empty if there was none."""
    found, num_unreadable = LastRun(), 0
    for event in read_events(run_dir):
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


class Follower:
    """Reads a log of events while it grows."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._offset = 0
        self._num_seen = 0

    def new_events(self) -> list[Event]:
        """Events since the last call. A line that is not complete is left for the next call. Lines that are no events are left
        out. Raises InputError if the log is not a regular file."""
        if is_remote(self._run_dir):
            events = list(read_events(self._run_dir))
            new, self._num_seen = events[self._num_seen :], len(events)
        else:
            new = list(parse_events(self._new_lines()))
        return [event for event in new if event is not None]

    def _new_lines(self) -> list[bytes]:
        path = self._run_dir / EVENTS_FILE
        try:
            check_regular(path)
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as log:
                if os.fstat(log.fileno()).st_size < self._offset:
                    self._offset = 0  # another log has taken its place
                log.seek(self._offset)
                whole, line_break, _ = log.read(_MAX_READ_BYTES).rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(line_break)
        return whole.splitlines()
