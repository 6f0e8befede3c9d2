"""The log of a run's events: their fields and their reader. One JSON object a line, in `events.jsonl` of the run directory.

Object storage cannot append to an object. There the log is a folder `events/` of such files, ordered by name. The log is for
information; whether a unit is done is read from manifests only.
"""

import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stages.io.storage import is_remote
from stages.io.untrusted import check_regular, read_small

EVENTS_FILE = "events.jsonl"
EVENTS_DIR = "events"
RUN_BEGINS, RUN_ENDS, STAGE_BEGINS = "run begins", "run ends", "stage begins"
STARTED, SEALED, LOST, FAILED = "started", "sealed", "lost", "failed"
KINDS = {
    RUN_BEGINS: "The driver has checked the run file and holds the lock of the run directory.",
    STAGE_BEGINS: "The units of a stage are known, and which of them are to be run.",
    STARTED: "A unit is given to a worker.",
    SEALED: "A unit is finished: its manifest is written.",
    LOST: "A try of a unit came to nothing, for example because its worker died. It is tried again.",
    FAILED: "A unit has failed for good. The run ends once the units that still run have ended.",
    RUN_ENDS: "The driver leaves. A run whose driver was killed has no such event.",
}
"""What each kind of event says."""
_MAX_LINE_BYTES = 1 << 20


def _encodable(value: object) -> object:
    """Replace lone surrogates, which file names may contain and JSON readers reject."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_encodable)]
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Seconds = Annotated[float, Field(ge=0, le=1e11)]


class Event(BaseModel):
    """One event. Fields that a kind of event does not have are left out of its line."""

    model_config = ConfigDict(frozen=True, strict=True, use_attribute_docstrings=True)

    time: Seconds
    """Seconds since 1970."""
    event: str
    """Kind of the event."""
    unit: Text = ""
    """Path of the unit in the run directory."""
    stage: Text = ""
    """Stage that begins, or that the unit belongs to."""
    num_units: Count = 0
    """Of a stage that begins: units that are to be run."""
    num_reused: Count = 0
    """Of a stage that begins: units that are finished already."""
    host: Text = ""
    """Machine that the unit ran on."""
    message: Text = ""
    """Why a unit was lost or has failed."""
    worker: Text = ""
    """What runs the unit; empty for a task on a CPU."""
    hold: Text = ""
    """What the unit's worker holds, such as a layer shard."""
    elapsed_s: Seconds = 0.0
    """Seconds of the unit alone."""
    open_s: Seconds = 0.0
    """Seconds spent on opening what the worker holds."""
    peak_bytes: Count = 0
    """Peak memory of the worker's process."""
    gpu_peak_bytes: Count = 0
    """Peak memory on the worker's GPU."""
    bytes_read: Count = 0
    """Bytes of transient files and of the checkpoint that were read for the unit, with what its worker newly opened."""
    bytes_written: Count = 0
    """Bytes that the unit wrote."""
    num_tokens: Count = 0
    """Tokens that went through the unit."""
    kinds: dict[str, Count] = {}
    """Of a stage that begins: number of its units by kind."""
    stages: list[Text] = []
    """Of a run that begins: names of its stages."""
    num_workers: Count = 0
    """Of a run that begins: workers that it asks for."""
    num_failed: Count = 0
    """Of a run that ends: units that failed for good."""
    command: Text = ""
    """Of a run that begins: the command line."""


def now() -> float:
    """The time of an event that happens now, in seconds since 1970."""
    return round(time.time(), 3)


def kind_of(unit: str) -> str:
    """Kind of a unit, to compare times of like units: its name without the numbers and without the folder of its part."""
    return re.sub(r"\d+", "#", unit.rpartition("/")[2])


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


def parse_events(lines: Iterable[bytes]) -> Iterator[Event | None]:
    """The event of each line; None for a line that is not an event, such as one that a killed driver left half written."""
    for line in lines:
        try:
            yield Event.model_validate_json(line)
        except ValidationError:
            yield None


def read_events(run_dir: Path) -> Iterator[Event | None]:
    """All events of a run directory, as `parse_events`; none if there is no log."""
    yield from parse_events(_lines(run_dir))
