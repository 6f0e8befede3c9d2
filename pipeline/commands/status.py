"""`status`: how far a run is, from its files alone."""

import time
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from pipeline.display.printing import add_row
from pipeline.display.sizes import human_bytes
from pipeline.driver.selection import select
from pipeline.names import STAGES
from pipeline.run.graph import Graph
from pipeline.run.identity import differences
from pipeline.run.owned import IDENTITY_FILE, read_identity, stage_folders
from pipeline.run.record import read_record
from pipeline.run.stage_keys import StageRun, Stages
from pipeline.state.events import EVENTS_FILE, LastRun, last_run
from pipeline.state.lock import describe_holder
from pipeline.state.manifest import read_manifest
from stages.contracts.errors import InputError
from stages.io.storage import absolute, as_path

_MAX_LISTED = 20


def load_graph(where: str | Path) -> Graph:
    """The graph of the last run in a run directory, to look at. Raises InputError when there was none."""
    run_dir = absolute(where)
    record = read_record(run_dir)
    stages = Stages(record.config, record.identities)
    return Graph(record.config, stages, run_dir, as_path(record.model), num_workers=None)


def describe_status(run_dir: str | Path) -> Iterator[Table | str]:
    """Lines and tables for the terminal."""
    graph = load_graph(run_dir)
    yield describe_holder(graph.run_dir)
    try:
        last = last_run(graph.run_dir)
    except InputError as e:
        yield f"{e}; what ran is not known"
        last = LastRun()
    table = Table("stage", "units", "sealed", "reused", "to run", "bytes", "unit seconds", title=None)
    waits_for = ""
    for stage in STAGES:
        if waits_for:
            add_row(table, (stage, "?", "", "", f"after {waits_for}", "", ""))
            continue
        units = graph.units(stage)
        to_run = select(units, verify=False)
        manifests = [manifest for unit in units if (manifest := read_manifest(unit)) is not None]
        num_bytes = sum(recorded.bytes for manifest in manifests for recorded in manifest.files.values())
        seconds = sum(manifest.elapsed_s for manifest in manifests)
        counts = (len(units), len(manifests), last.reused.get(stage, 0), len(to_run))
        add_row(table, (stage, *counts, human_bytes(num_bytes), f"{seconds:.1f}"))
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
    yield from _reasons(graph)


def _running(last: LastRun) -> Iterator[str]:
    """Units that were started and have not ended, the oldest first; none if the driver ended as it should. Those of a driver
    that was killed are listed too: the line on the driver says that it is gone."""
    if last.is_over:
        return
    now = time.time()
    for unit, since in list(last.running.items())[:_MAX_LISTED]:
        yield f"running since {_clock(since)} ({now - since:.0f} s): {unit}"
    if len(last.running) > _MAX_LISTED:
        yield f"running: {len(last.running) - _MAX_LISTED} more"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _reasons(graph: Graph) -> Iterator[str]:
    """For every stage that starts anew although an older result of it exists: the settings that changed."""
    for stage in graph.stages.all():
        if any((graph.run_dir / stage.dir / "manifests").rglob("*.json")):
            continue
        older = _newest_other(graph.run_dir, stage)
        identity = read_identity(older) if older is not None else None
        if older is not None and identity is not None:
            changes = "; ".join(differences(identity, stage.identity))
            yield f"{stage.name} is not reused from {older.name}: {changes}"


def _newest_other(run_dir: Path, stage: StageRun) -> Path | None:
    others = [path for path in stage_folders(run_dir) if path.name != stage.dir and path.name.rsplit("-", 1)[0] == stage.name]
    return max(others, key=lambda path: (path / IDENTITY_FILE).stat().st_mtime, default=None)
