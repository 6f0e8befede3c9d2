"""When and where units ran, with bytes, memory and waiting, from the run's event log.

Times are those of the driver's clock. Runs that were interrupted and continued stand one after another, without the time
between.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.contracts.errors import InputError
from stages.contracts.events import FAILED, LOST, RUN_BEGINS, SEALED, STARTED, Event, read_events
from stages.report.packing import packed

MAX_UNITS = 20_000
"""Units that the page shows one by one: the longest. All count in the sums of the nodes."""

_CLOCK_S = 0.05
"""Units that overlap by less count as one after another: times of driver and workers differ."""


@dataclass(frozen=True)
class Ran:
    """A unit that was sealed. begin_s, end_s: seconds since the first run began, from being given to its worker to its end,
    without the time between runs. worker: empty for a task on a CPU. event: of its end."""

    begin_s: float
    end_s: float
    worker: str
    event: Event

    @property
    def start_s(self) -> float:
        """When its own work began."""
        return max(self.begin_s, self.end_s - self.event.elapsed_s)

    @property
    def wait_s(self) -> float:
        """Seconds between being given to its worker and its beginning: what its worker opens first, and a queue."""
        return self.start_s - self.begin_s


@dataclass(frozen=True)
class Story:
    """What the event log of a run directory tells of some parts. command: of the last run. num_retried: units that had to be
    tried again."""

    command: str
    units: tuple[Ran, ...]
    num_retried: int


def read_story(run_dir: Path, part_dirs: Iterable[str]) -> Story:
    """Of units in these parts, the last time that each was sealed. Empty where the log cannot be read: it is no result."""
    wanted = set(part_dirs)
    sealed: dict[str, Ran] = {}
    given: dict[str, tuple[float, str]] = {}
    command, num_retried, shift_s, last = "", 0, 0.0, None
    try:
        for event in read_events(run_dir):
            if event is None:
                continue
            if event.event == RUN_BEGINS:
                command, given = event.command, {}
                shift_s += event.time - (event.time if last is None else last)
            if last is None:
                shift_s += event.time
            last = event.time
            if event.unit.partition("/")[0] not in wanted:
                continue
            if event.event == STARTED:
                given[event.unit] = (event.time - shift_s, event.worker)
            elif event.event in (SEALED, LOST, FAILED) and event.unit in given:
                begin_s, worker = given.pop(event.unit)
                num_retried += event.event == LOST
                if event.event == SEALED:
                    sealed[event.unit] = Ran(begin_s, event.time - shift_s, worker, event)
    except InputError:
        return Story("", (), 0)
    return Story(command, tuple(sorted(sealed.values(), key=lambda one: (one.begin_s, one.event.unit))), num_retried)


def timeline_values(story: Story) -> dict[str, Any]:
    """For the page: the nodes' sums, and the longest units as columns, in the order of their beginning."""
    shown = sorted(story.units, key=lambda one: one.begin_s - one.end_s)[:MAX_UNITS]
    shown.sort(key=lambda one: (one.start_s, one.event.unit))
    lanes, rows = _lanes(shown)
    stages = list(dict.fromkeys(one.event.stage for one in story.units))
    parts = list(dict.fromkeys(one.event.unit.partition("/")[0] for one in shown))
    return {
        "num_units": len(story.units),
        "num_retried": story.num_retried,
        "nodes": _nodes(story.units),
        "stages": stages,
        "parts": parts,
        "lanes": lanes,
        "part": packed(np.array([parts.index(one.event.unit.partition("/")[0]) for one in shown]), "uint16"),
        "name": [one.event.unit.partition("/")[2] for one in shown],
        "stage": packed(np.array([stages.index(one.event.stage) for one in shown]), "uint8"),
        "lane": packed(np.array(rows), "uint16"),
        "begin_s": packed(np.array([one.begin_s for one in shown]), "float32"),
        "wait_s": packed(np.array([one.wait_s for one in shown]), "float32"),
        "end_s": packed(np.array([one.end_s for one in shown]), "float32"),
        "bytes_read": packed(np.array([one.event.bytes_read for one in shown]), "float32"),
        "bytes_written": packed(np.array([one.event.bytes_written for one in shown]), "float32"),
        "peak_bytes": packed(np.array([one.event.peak_bytes for one in shown]), "float32"),
        "gpu_peak_bytes": packed(np.array([one.event.gpu_peak_bytes for one in shown]), "float32"),
    }


def _lanes(units: Iterable[Ran]) -> tuple[list[dict[str, str]], list[int]]:
    """Rows of the timeline: one for each worker, and on each node as many for its CPU tasks as ran at once; and the row of each
    unit."""
    free_s: dict[tuple[str, str, int], float] = {}
    chosen = []
    for one in units:
        row = (one.event.host, one.worker, 0)
        while not one.worker and free_s.get(row, 0.0) > one.start_s + _CLOCK_S:
            row = (row[0], "", row[2] + 1)
        free_s[row] = one.end_s
        chosen.append(row)
    names = sorted(free_s)
    places = {row: place for place, row in enumerate(names)}
    lanes = [{"node": host, "worker": worker or f"CPU {number + 1}"} for host, worker, number in names]
    return lanes, [places[row] for row in chosen]


def _nodes(units: Iterable[Ran]) -> list[dict[str, str | float]]:
    """Sums over the units of each node. wait_s: see `Ran`. busy_s: seconds of the units alone, of all its workers together."""
    found: dict[str, list[Ran]] = {}
    for one in units:
        found.setdefault(one.event.host, []).append(one)
    return [
        {
            "node": host,
            "num_units": len(ran),
            "busy_s": round(sum(one.event.elapsed_s for one in ran), 1),
            "wait_s": round(sum(one.wait_s for one in ran), 1),
            "open_s": round(sum(one.event.open_s for one in ran), 1),
            "bytes_read": sum(one.event.bytes_read for one in ran),
            "bytes_written": sum(one.event.bytes_written for one in ran),
            "peak_bytes": max(one.event.peak_bytes for one in ran),
            "gpu_peak_bytes": max(one.event.gpu_peak_bytes for one in ran),
        }
        for host, ran in sorted(found.items())
    ]
