"""Drives a run: checks, locks, runs stage after stage, publishes."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import preflight
from pipeline.config import RunConfig
from pipeline.errors import RunFailed
from pipeline.executors.base import Executor
from pipeline.graph import Graph
from pipeline.lock import RunLock
from pipeline.progress import Reporter
from pipeline.publish import publish_model, publish_report
from pipeline.scheduler import UnitFailure, leftovers, run_units, select
from pipeline.stage_keys import STAGES, Stages
from stages.common.errors import InputError
from stages.common.files import write_json
from stages.common.paths import REPORT_FILE

RUN_FILE = "run.json"
IDENTITY_FILE = "identity.json"


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: the report (as parsed) and how many units it ran."""

    report: dict[str, Any]
    report_path: Path
    num_run: int
    num_reused: int
    elapsed_s: float


def prepare_run(config: RunConfig) -> tuple[Stages, Path, Path]:
    """Check a run file against its checkpoint and texts. Returns stages, run directory and checkpoint folder, both absolute."""
    checkpoint, identities = preflight.check(config)
    return Stages(config, identities), Path(config.run_dir).resolve(), checkpoint.folder.resolve()


def run(config: RunConfig, make_executor: Callable[[Path], Executor], reporter: Reporter, verify: bool = False) -> RunResult:
    """Run every stage that is not sealed yet.

    Raises InputError before anything starts for bad input, RunFailed when units fail (what others sealed is kept).
    """
    started = time.monotonic()
    stages, run_dir, model = prepare_run(config)
    with RunLock(run_dir) as lock:
        if lock.took_over:
            reporter.line(f"took over the stale lock of {lock.took_over}")
        _record(config, stages, run_dir, model)
        executor = make_executor(run_dir)
        try:
            num_run, num_reused = _run_stages(config, stages, run_dir, model, executor, reporter, verify)
        finally:
            executor.close()
        report_path = publish_report(run_dir, run_dir / stages.report.dir / REPORT_FILE)
    report = json.loads(report_path.read_text())
    return RunResult(report, report_path, num_run, num_reused, time.monotonic() - started)


def _record(config: RunConfig, stages: Stages, run_dir: Path, model: Path) -> None:
    for stage in stages.all():
        path = run_dir / stage.dir / IDENTITY_FILE
        if not path.exists():
            write_json(path, stage.identity)
    write_json(
        run_dir / RUN_FILE,
        {
            "config": config.model_dump(mode="json"),
            "model": str(model),
            "identities": {key: dict(value) for key, value in stages.identities.items()},
        },
    )


def _run_stages(
    config: RunConfig, stages: Stages, run_dir: Path, model: Path, executor: Executor, reporter: Reporter, verify: bool
) -> tuple[int, int]:
    graph = Graph(config, stages, run_dir, model, executor.num_workers)
    num_run = num_reused = 0
    for stage in STAGES:
        units = graph.units(stage)
        selected = select(run_dir, units, verify)
        for path in leftovers(units, selected):
            (run_dir / path).unlink(missing_ok=True)
        reporter.begin(stage, len(selected), len(units) - len(selected))
        try:
            failures = run_units(selected, executor, config.resources.max_attempts, reporter.done, reporter.line)
        finally:
            reporter.end()
        if failures:
            raise _error(failures, run_dir)
        num_run += len(selected)
        num_reused += len(units) - len(selected)
        if stage == "prepare":
            preflight.check_layers(config, len(graph.plan["moe_layers"]))
        if stage == "assemble":
            for target in stages.targets:
                publish_model(run_dir, target.name, graph.checkpoint_dir(target))
    return num_run, num_reused


def _error(failures: list[UnitFailure], run_dir: Path) -> InputError | RunFailed:
    """What stopped the run: InputError if there is nothing but the user's input to mend, else RunFailed."""
    lines = []
    for failed in failures:
        failure = failed.outcome.failure
        assert failure is not None
        if failure.kind == "input":
            lines.append(failure.message)
            continue
        tries = f" (tried {failed.attempts} times)" if failed.attempts > 1 else ""
        where = f" on {failed.outcome.host}" if failed.outcome.host else ""
        lines.append(f"{failed.unit.stage} {failed.unit.label}{where}: {failure.message}{tries}\n{failure.detail}".rstrip())
    if all(failed.outcome.failure and failed.outcome.failure.kind == "input" for failed in failures):
        return InputError("\n".join(dict.fromkeys(lines)))
    lines.append(f"What was finished is kept in {run_dir}; the same command continues from there.")
    return RunFailed("\n".join(lines))
