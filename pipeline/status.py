"""`status`: how far a run is, from its files alone."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from pipeline.config import RunConfig
from pipeline.events import LastRun, last_run
from pipeline.graph import Graph
from pipeline.identity import differences
from pipeline.lock import describe_holder
from pipeline.manifest import read_manifest
from pipeline.names import STAGES
from pipeline.run_state import IDENTITY_FILE, RUN_FILE
from pipeline.selection import select
from pipeline.stage_keys import StageRun, Stages
from pipeline.table import human_bytes
from stages.common.errors import InputError
from stages.common.storage import absolute, as_path, check_readable
from stages.common.untrusted import read_json

_MAX_LISTED = 20


def load_graph(where: str | Path) -> Graph:
    """The graph of the last run in a run directory, to look at. Raises InputError when there was none."""
    run_dir = absolute(where)
    check_readable(run_dir)
    if not (run_dir / RUN_FILE).exists():
        raise InputError(f"{run_dir} is not a run directory: it has no {RUN_FILE}; give the run_dir of a run file")
    recorded = read_json(run_dir / RUN_FILE)
    config = RunConfig.model_validate(recorded["config"])
    return Graph(config, Stages(config, recorded["identities"]), run_dir, as_path(recorded["model"]), num_workers=None)


def describe_status(run_dir: str | Path) -> Iterator[Table | str]:
    """Lines and tables for the terminal."""
    graph = load_graph(run_dir)
    yield describe_holder(graph.run_dir)
    last = last_run(graph.run_dir)
    table = Table("stage", "units", "sealed", "reused", "to run", "bytes", "unit seconds", title=None)
    waits_for = ""
    for stage in STAGES:
        if waits_for:
            table.add_row(stage, "?", "", "", f"after {waits_for}", "", "")
            continue
        units = graph.units(stage)
        to_run = select(units, verify=False)
        manifests = [manifest for unit in units if (manifest := read_manifest(unit)) is not None]
        num_bytes = sum(recorded["bytes"] for manifest in manifests for recorded in manifest.files.values())
        seconds = sum(manifest.elapsed_s for manifest in manifests)
        counts = (len(units), len(manifests), last.reused.get(stage, 0), len(to_run))
        table.add_row(stage, *map(str, counts), human_bytes(num_bytes), f"{seconds:.1f}")
        if to_run:
            waits_for = stage
    yield table
    yield from _running(last)
    for unit, event in list(last.failed.items())[:_MAX_LISTED]:
        where = f" on {event['host']}" if event.get("host") else ""
        yield f"failed{where} at {_clock(event['time'])}: {unit}: {event.get('message', 'no cause is recorded')}"
    if len(last.failed) > _MAX_LISTED:
        yield f"failed: {len(last.failed) - _MAX_LISTED} more, in events.jsonl"
    if last.num_lost:
        yield f"units given to another worker in the last run: {last.num_lost}"
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
        if older is not None:
            changes = "; ".join(differences(json.loads((older / IDENTITY_FILE).read_text()), stage.identity))
            yield f"{stage.name} is not reused from {older.name}: {changes}"


def _newest_other(run_dir: Path, stage: StageRun) -> Path | None:
    others = [
        path
        for path in run_dir.glob(f"{stage.name}-*")
        if path.name != stage.dir and path.name.rsplit("-", 1)[0] == stage.name and (path / IDENTITY_FILE).exists()
    ]
    return max(others, key=lambda path: (path / IDENTITY_FILE).stat().st_mtime, default=None)
