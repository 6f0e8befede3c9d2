"""`events.jsonl`: what happened in a run directory, one JSON object a line, for people and dashboards."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"
RUN_BEGINS, RUN_ENDS, STAGE_BEGINS = "run begins", "run ends", "stage begins"
STARTED, SEALED, LOST, FAILED = "started", "sealed", "lost", "failed"


class EventLog:
    """Appends events. It is a log: whether work is done is read from manifests only."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / EVENTS_FILE

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time in seconds since 1970; fields that are None are left out."""
        record = {"time": round(time.time(), 3), "event": event}
        record |= {name: value for name, value in fields.items() if value is not None}
        with open(self._path, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


@dataclass
class LastRun:
    """What the log knows of the last run, units by their path in the run directory.

    running: when they were started (seconds since 1970). failed: their last event. reused: units by stage. num_lost: how often
    a unit had to be tried again. is_over: whether the driver has ended as it should.
    """

    running: dict[str, float] = field(default_factory=dict)
    failed: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    num_lost: int = 0
    is_over: bool = False


def _events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """All events; a line that a killed driver has left half written is passed over."""
    try:
        with open(run_dir / EVENTS_FILE, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue
    except FileNotFoundError:
        return


def last_run(run_dir: Path) -> LastRun:
    """What the log tells of the last run; nothing if there was none."""
    found = LastRun()
    for event in _events(run_dir):
        kind = event["event"]
        if kind == RUN_BEGINS:
            found = LastRun()
        elif kind == RUN_ENDS:
            found.is_over = True
        elif kind == STAGE_BEGINS:
            found.reused[event["stage"]] = event["num_reused"]
        elif kind == STARTED:
            found.running[event["unit"]] = event["time"]
        else:
            found.running.pop(event["unit"], None)
            found.num_lost += kind == LOST
            if kind == FAILED:
                found.failed[event["unit"]] = event
    return found
