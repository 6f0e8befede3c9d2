"""Unit of report: `report.json`."""

import json
import platform
from collections.abc import Mapping
from typing import Any

import pyarrow
import scipy
import torch
import transformers

from stages.common.files import write_json
from stages.common.paths import PLAN_FILE, REPORT_FILE, SCORES_FILE
from stages.common.unit import Job, UnitResult


def _scores(job: Job, evaluate_dir: str | None) -> dict[str, Any]:
    if evaluate_dir is None:
        return {}
    return json.loads((job.run_dir / evaluate_dir / SCORES_FILE).read_text())  # type: ignore[no-any-return]


def _tied_stock_gaps(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perplexity of stock minus that of tied, for each target exported as both."""
    by_target: dict[str, dict[str, Mapping[str, Any]]] = {}
    for model in models:
        if model["format"] is not None and "perplexity" in model:
            by_target.setdefault(model["target"], {})[model["format"]] = model
    return [
        {"target": target, "perplexity_gap": formats["stock"]["perplexity"] - formats["tied"]["perplexity"]}
        for target, formats in by_target.items()
        if len(formats) == 2
    ]


def report_unit(job: Job) -> UnitResult:
    """Write `report.json`.

    args: survey_dir, source (name, path, evaluate_dir), targets (name, target, format, num_experts, path, parameters, bytes,
    evaluate_dir, unweighted_clusters), never_routed (layer -> experts), settings.
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
        {**{key: value for key, value in target.items() if key != "evaluate_dir"}, **_scores(job, target["evaluate_dir"])}
        for target in args["targets"]
    ]
    report = {
        "models": [source, *targets],
        "tied_stock_gaps": _tied_stock_gaps(targets),
        "never_routed": args["never_routed"],
        "plan": plan,
        "settings": args["settings"],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scipy": scipy.__version__,
            "pyarrow": pyarrow.__version__,
        },
    }
    return UnitResult((write_json(job.stage_dir / REPORT_FILE, report),), facts={"num_models": len(report["models"])})
