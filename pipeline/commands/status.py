"""`status`: progress of a run, from its files alone."""

import time
from collections.abc import Iterator
from pathlib import Path

from rich import filesize
from rich.table import Table

from pipeline.display.printing import add_row
from pipeline.driver.selection import select
from pipeline.run.identity import differences
from pipeline.run.owned import IDENTITY_FILE, read_identity, stage_folders
from pipeline.run.record import recorded_view
from pipeline.run.view import RunView
from pipeline.state.events import EVENTS_FILE, LastRun, last_run
from pipeline.state.lock import describe_holder
from pipeline.state.manifest import read_manifest
from stages.contracts.errors import InputError
from stages.contracts.keys import Part

_MAX_LISTED = 20


def describe_status(run_dir: str | Path) -> Iterator[Table | str]:
    """Lines and tables for the terminal."""
    view = recorded_view(run_dir)
    yield describe_holder(view.run_dir)
    try:
        last = last_run(view.run_dir)
    except InputError as e:
        yield f"{e}; what ran is not known"
        last = LastRun()
    table = Table("stage", "units", "sealed", "reused", "to run", "bytes", "unit seconds", title=None)
    waits_for = ""
    for spec in view.specs:
        stage = spec.name
        if waits_for:
            add_row(table, (stage, "?", "", "", f"after {waits_for}", "", ""))
            continue
        units = view.units(stage)
        to_run = select(units, verify=False)
        manifests = [manifest for unit in units if (manifest := read_manifest(unit)) is not None]
        num_bytes = sum(recorded.bytes for manifest in manifests for recorded in manifest.files.values())
        seconds = sum(manifest.elapsed_s for manifest in manifests)
        counts = (len(units), len(manifests), last.reused.get(stage, 0), len(to_run))
        add_row(table, (stage, *counts, filesize.decimal(num_bytes), f"{seconds:.1f}"))
        if to_run:
            waits_for = stage
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
    yield from _reasons(view)


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
