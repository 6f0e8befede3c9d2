"""`events.jsonl`: what happened in a run directory, one JSON object a line, for people and dashboards."""

import json
import time
from pathlib import Path
from typing import Any

EVENTS_FILE = "events.jsonl"


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
