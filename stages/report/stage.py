"""Unit of report: `report.json`."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from stages.contracts.certainty import read_errors, read_stability
from stages.contracts.paths import PLAN_FILE, REPORT_FILE, SCORES_FILE, errors_file, stability_file
from stages.contracts.units import Job, UnitResult
from stages.io.files import write_json
from stages.report.warnings import of_certainty, of_scores

_NOT_REPORTED = ("evaluate_dir", "num_merged")


def _scores(job: Job, evaluate_dir: str | None) -> dict[str, Any]:
    if evaluate_dir is None:
        return {}
    return json.loads((job.run_dir / evaluate_dir / SCORES_FILE).read_text())  # type: ignore[no-any-return]


def _tied_stock_gaps(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity of stock minus that of tied, for each target exported as both; null where either has none."""
    by_target: dict[str, dict[str, Mapping[str, Any]]] = {}
    for model in models:
        if model["format"] is not None and "perplexity" in model:
            by_target.setdefault(model["target"], {})[model["format"]] = model
    gaps = []
    for target, formats in by_target.items():
        if len(formats) == 2:
            stock, tied = (formats[name]["perplexity"] for name in ("stock", "tied"))
            gaps.append({"target": target, "perplexity_gap": None if stock is None or tied is None else stock - tied})
    return gaps


def _certainty(job: Job) -> dict[str, Any] | None:
    """Under sampling: mean and largest relative standard error of mean outputs, and for each target and layer how often halves
    of the data give its labels again, and how alike they are.

    A standard error that is not finite is null, and left out of the mean and the largest; those are null where none is finite.
    """
    if job.args["certainty_dir"] is None:
        return None
    folder = job.run_dir / job.args["certainty_dir"]
    moe_layers = job.args["targets"][0]["num_merged"]
    errors = {
        layer: [error if math.isfinite(error) else None for error in read_errors(errors_file(folder, int(layer))).tolist()]
        for layer in moe_layers
    }
    finite = [error for values in errors.values() for error in values if error is not None]
    stability: dict[str, Any] = {}
    for target in job.args["targets"]:
        rows = {
            layer: asdict(read_stability(stability_file(folder, int(layer))).of(count))
            for layer, count in target["num_merged"].items()
        }
        stability[target["target"]] = {
            "equal_share": sum(row["equal_share"] for row in rows.values()) / len(rows),
            "mean_adjusted_rand_index": sum(row["mean_adjusted_rand_index"] for row in rows.values()) / len(rows),
            "layers": rows,
        }
    return {
        "mean_relative_standard_error": sum(finite) / len(finite) if finite else None,
        "largest_relative_standard_error": max(finite, default=None),
        "relative_standard_errors": errors,
        "stability": stability,
    }


def report_unit(job: Job) -> UnitResult:
    """Write `report.json`.

    args: survey_dir, source (name, path, evaluate_dir), targets (name, target, format, num_experts, path, parameters, bytes,
    evaluate_dir, unweighted_clusters, num_merged), never_routed (layer -> experts), certainty_dir (of cluster, or None),
    settings, versions (of the libraries that computed each stage).
    """
    args = job.args
    plan = json.loads((job.run_dir / args["survey_dir"] / PLAN_FILE).read_text())
    source = {
        "name": args["source"]["name"],
        "target": "source",
        "format": None,
        "num_experts": plan["num_experts"],
        "parameters": plan["num_parameters"],
        "bytes": plan["total_bytes"],
        "path": args["source"]["path"],
        **_scores(job, args["source"]["evaluate_dir"]),
    }
    targets = [
        {**{key: value for key, value in target.items() if key not in _NOT_REPORTED}, **_scores(job, target["evaluate_dir"])}
        for target in args["targets"]
    ]
    certainty = _certainty(job)
    models = [source, *targets]
    report = {
        "models": models,
        "warnings": [*of_scores(models), *of_certainty(certainty)],
        "tied_stock_gaps": _tied_stock_gaps(targets),
        "never_routed": args["never_routed"],
        **({"certainty": certainty} if certainty else {}),
        "plan": plan,
        "settings": args["settings"],
        "versions": args["versions"],
    }
    return UnitResult((write_json(job.stage_dir / REPORT_FILE, report),), facts={"num_models": len(models)})
