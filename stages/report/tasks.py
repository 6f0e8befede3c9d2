"""Scores of tasks in the report, from the results that the harness wrote for each model and task."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stages.contracts.paths import RESULTS_FILE
from stages.contracts.units import Job
from stages.io.files import WrittenFile, write_json
from stages.report.spec import ReportArgs, ReportedTask, harness_file

_FIRST = ("acc", "exact_match", "pass@1", "pass_at_1", "prompt_level_strict_acc", "f1")
"""Metrics that stand for a task where it has several, best first; else its first one does."""
_JOINED = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
"""Parts of the harness's results that have an entry for each task."""

Values = dict[str, Any]


def read_results(job: Job[ReportArgs]) -> dict[str, dict[str, Values]]:
    """The harness's results by name of the model and of the task; of tasks that have failed there are none."""
    found: dict[str, dict[str, Values]] = {}
    for task in job.args.tasks:
        if task.folder is not None:
            results = json.loads((job.run_dir / task.folder / RESULTS_FILE).read_text())
            found.setdefault(task.model, {})[task.task] = results
    return found


def scores_of(results: Mapping[str, Values]) -> dict[str, Values]:
    """Scores by task: the metric that stands for it, and all of them with standard errors (None where there is none)."""
    return {task: _task(task, values) for task, values in results.items()}


def _task(task: str, values: Values) -> Values:
    rows: Mapping[str, Values] = values["results"]
    better = values["higher_is_better"]
    # a group that aggregates has a row of its own; of another one, the tasks stand for it
    row = rows.get(task)
    metrics = list(_metrics(row, better.get(task) or _first_of(better)) if row is not None else ())
    parts = {name: list(_metrics(one, better.get(name, {}))) for name, one in rows.items() if name != task}
    if not metrics:
        metrics = list(_means(list(parts.values())))
    return {
        "metric": _chosen(metrics),
        "metrics": metrics,
        "num_documents": sum(count["effective"] for count in values["n-samples"].values()),
        "versions": values["versions"],
        **({"tasks": {name: one for name, one in parts.items() if one}} if parts else {}),
    }


def _first_of(better: Mapping[str, Mapping[str, bool]]) -> Mapping[str, bool]:
    return {metric: is_higher for one in better.values() for metric, is_higher in one.items()}


def _metrics(row: Values, better: Mapping[str, bool | None]) -> Iterator[Values]:
    """Metrics of one row of the harness: keys are `acc,none` and `acc_stderr,none`, the filter behind the comma."""
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = row.get(f"{metric}_stderr,{filter_name}")
        yield {
            "metric": metric,
            "filter": filter_name,
            "value": value if isinstance(value, int | float) else None,
            "standard_error": error if isinstance(error, int | float) else None,
            "higher_is_better": better.get(metric),
        }


def _means(tasks: Sequence[Sequence[Values]]) -> Iterator[Values]:
    """Plain means of the metrics that all tasks have, for a group that the harness does not aggregate."""
    for first in tasks[0] if tasks else ():
        alike = [
            [one for one in task if (one["metric"], one["filter"]) == (first["metric"], first["filter"])] for task in tasks
        ]
        if all(len(one) == 1 and one[0]["value"] is not None for one in alike):
            yield {**first, "value": sum(one[0]["value"] for one in alike) / len(alike), "standard_error": None}


def _chosen(metrics: Sequence[Values]) -> Values | None:
    ordered = sorted(metrics, key=lambda one: _FIRST.index(one["metric"]) if one["metric"] in _FIRST else len(_FIRST))
    return ordered[0] if ordered else None


def failures_of(tasks: Sequence[ReportedTask]) -> list[dict[str, str]]:
    """Tasks without scores, and why."""
    return [{"model": task.model, "task": task.task, "reason": task.failure} for task in tasks if task.failure is not None]


def write_harness_results(job: Job[ReportArgs], found: Mapping[str, Mapping[str, Values]]) -> list[WrittenFile]:
    """For each model, the results of all tasks in one file of the harness's own form."""
    files = []
    for name in dict.fromkeys(task.model for task in job.args.tasks):
        tasks = found.get(name, {})
        joined: Values = {}
        for values in tasks.values():
            for key, value in values.items():
                joined[key] = {**joined.get(key, {}), **value} if key in _JOINED else joined.get(key, value)
        files.append(write_json(job.part_dir / harness_file(name), {"model_name": name, **joined}))
    return files
