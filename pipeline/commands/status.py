"""`status`: progress of a run, from its files alone."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter
from rich import filesize
from rich.table import Table

from pipeline.display.printing import add_row
from pipeline.driver.selection import select
from pipeline.run.identity import differences
from pipeline.run.owned import IDENTITY_FILE, read_identity, stage_folders
from pipeline.run.record import recorded_view
from pipeline.run.view import RunView
from pipeline.state.events import LastRun, last_run
from pipeline.state.lock import describe_holder
from pipeline.state.manifest import read_manifest
from stages.contracts.errors import InputError
from stages.contracts.events import EVENTS_FILE
from stages.contracts.keys import Part

_MAX_LISTED = 20


@dataclass(frozen=True)
class StageStatus:
    """How far a stage is, in units. waits_for: the unfinished stage after which its units are known, all counts being 0 till
    then; else empty. num_bytes, unit_s: bytes and seconds of sealed units."""

    stage: str
    waits_for: str
    num_units: int = 0
    num_sealed: int = 0
    num_reused: int = 0
    num_to_run: int = 0
    num_bytes: int = 0
    unit_s: float = 0.0


@dataclass(frozen=True)
class RunStatus:
    """How far a run is. driver: who works on it, in words. problem: why it is not known what ran; else empty. reasons: why
    stages are redone, a line each."""

    run_dir: str
    driver: str
    stages: tuple[StageStatus, ...]
    last: LastRun
    problem: str
    reasons: tuple[str, ...]

    def values(self) -> dict[str, JsonValue]:
        """For JSON."""
        values: dict[str, JsonValue] = TypeAdapter(RunStatus).dump_python(self, mode="json")
        return values


def read_status(run_dir: str | Path) -> RunStatus:
    """How far a run is, from its files alone. Raises InputError when there was no run."""
    view = recorded_view(run_dir)
    problem = ""
    try:
        last = last_run(view.run_dir)
    except InputError as e:
        last, problem = LastRun(), f"{e}; what ran is not known"
    stages = tuple(_stages(view, last))
    return RunStatus(str(view.run_dir), describe_holder(view.run_dir), stages, last, problem, tuple(_reasons(view)))


def _stages(view: RunView, last: LastRun) -> Iterator[StageStatus]:
    waits_for = ""
    for spec in view.specs:
        stage = spec.name
        if waits_for:
            yield StageStatus(stage, waits_for)
            continue
        units = view.units(stage)
        to_run = select(units, verify=False)
        manifests = [manifest for unit in units if (manifest := read_manifest(unit)) is not None]
        num_bytes = sum(recorded.bytes for manifest in manifests for recorded in manifest.files.values())
        seconds = sum(manifest.elapsed_s for manifest in manifests)
        counts = (len(units), len(manifests), last.reused.get(stage, 0), len(to_run))
        yield StageStatus(stage, "", *counts, num_bytes, seconds)
        if to_run:
            waits_for = stage


def describe_status(run_dir: str | Path) -> Iterator[Table | str]:
    """Lines and tables for the terminal."""
    status = read_status(run_dir)
    last = status.last
    yield status.driver
    if status.problem:
        yield status.problem
    table = Table("stage", "units", "sealed", "reused", "to run", "bytes", "unit seconds", title=None)
    for one in status.stages:
        if one.waits_for:
            add_row(table, (one.stage, "?", "", "", f"after {one.waits_for}", "", ""))
            continue
        counts = (one.num_units, one.num_sealed, one.num_reused, one.num_to_run)
        add_row(table, (one.stage, *counts, filesize.decimal(one.num_bytes), f"{one.unit_s:.1f}"))
    yield table
    yield from _running(last)
    for unit, event in list(last.failed.items())[:_MAX_LISTED]:
        where = f" on {event.host}" if event.host else ""
        yield f"failed{where} at {_clock(event.time)}: {unit}: {event.message or 'no cause is recorded'}"
    if len(last.failed) > _MAX_LISTED:
        yield f"failed: {len(last.failed) - _MAX_LISTED} more, in events.jsonl"
    if last.num_lost:
        yield f"units tried again in the last run: {last.num_lost}"
    if last.num_unreadable:
        lines = "1 line" if last.num_unreadable == 1 else f"{last.num_unreadable} lines"
        yield f"{lines} of {EVENTS_FILE} cannot be read"
    yield from status.reasons


def _running(last: LastRun) -> Iterator[str]:
    """Units that were started and have not ended, oldest first. Empty if the driver ended normally. Units of a killed driver
    are listed too; the line about the driver says that it is gone."""
    if last.is_over:
        return
    now = time.time()
    for unit, since in list(last.running.items())[:_MAX_LISTED]:
        yield f"running since {_clock(since)} ({now - since:.0f} s): {unit}"
    if len(last.running) > _MAX_LISTED:
        yield f"running: {len(last.running) - _MAX_LISTED} more"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _reasons(view: RunView) -> Iterator[str]:
    """For every stage that has to be redone although it has an older result: the settings that changed."""
    for part in view.all_parts():
        if any((view.run_dir / part.dir / "manifests").rglob("*.json")):
            continue
        older = _newest_other(view.run_dir, part)
        identity = read_identity(older) if older is not None else None
        if older is not None and identity is not None:
            changes = "; ".join(differences(identity, part.identity))
            yield f"{part.full_name} is not reused from {older.name}: {changes}"


def _newest_other(run_dir: Path, part: Part) -> Path | None:
    others = [
        path for path in stage_folders(run_dir) if path.name != part.dir and path.name.rsplit("-", 1)[0] == part.full_name
    ]
    return max(others, key=lambda path: (path / IDENTITY_FILE).stat().st_mtime, default=None)
