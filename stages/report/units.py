"""The unit of report, which writes `report.json` and the page `report.html`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.contracts.certainty import read_errors, read_stability
from stages.contracts.documents import num_shared, read_documents
from stages.contracts.paths import REPORT_FILE, REPORT_PAGE_FILE, SCORES_FILE, SURVEY_FILE, errors_file, stability_file
from stages.contracts.units import Job, UnitResult
from stages.io.files import write_bytes, write_json
from stages.report.domains import Shares, coverage, rank_correlations, saliency_shares
from stages.report.generation import read_generation
from stages.report.layer_data import layer_values
from stages.report.page import page_of
from stages.report.spec import ReportArgs, ReportedTarget, ReportFacts
from stages.report.tasks import failures_of, read_results, scores_of, write_harness_results
from stages.report.timeline import read_story, timeline_values
from stages.report.warning_lines import of_certainty, of_generation, of_overlap, of_scores

Values = dict[str, Any]
"""Values of a JSON object."""


def report_unit(job: Job[ReportArgs]) -> UnitResult[ReportFacts]:
    """Write `report.json`, the page that shows it, and the results of the harness."""
    args = job.args
    survey = json.loads((job.run_dir / args.survey_dir / SURVEY_FILE).read_text())
    source = {
        "name": args.source_name,
        "target": "source",
        "variant": None,
        "format": None,
        "num_experts": survey["num_experts"],
        "parameters": survey["num_parameters"],
        "bytes": survey["total_bytes"],
        "path": args.source_path,
        **_scores(job, args.source_evaluate_dir),
    }
    layers = [layer for target in args.targets[:1] for layer in target.num_merged]
    shares = saliency_shares(job.run_dir / args.calibrate_dir, args.domains, layers) if args.domains else {}
    targets = [_target(job, target, shares) for target in args.targets]
    certainty = _certainty(job) if args.is_sampled else None
    models = [source, *targets]
    overlap, generation, results = _overlap(job), read_generation(job), read_results(job)
    failures = failures_of(args.tasks)
    for model in models if args.tasks else ():
        model["tasks"] = scores_of(results.get(model["name"], {}))
    report = {
        "models": models,
        "warnings": [*of_overlap(overlap), *of_scores(models), *of_generation(generation), *of_certainty(certainty)],
        "tied_stock_gaps": _tied_stock_gaps(targets),
        "never_routed": args.never_routed,
        **({"overlap": overlap} if overlap else {}),
        **({"generation": generation} if generation else {}),
        **({"failed_tasks": failures} if args.tasks else {}),
        **({"certainty": certainty} if certainty else {}),
        **({"rank_correlations": rank_correlations(args.domains, shares)} if shares else {}),
        "plan": survey,
        "settings": args.settings,
        "versions": args.versions,
    }
    page = page_of(_page_values(job, report, survey))
    files = [
        write_json(job.part_dir / REPORT_FILE, report),
        write_bytes(job.part_dir / REPORT_PAGE_FILE, page),
        *write_harness_results(job, results),
    ]
    lacking = f"it lacks {len(failures)} of {len(args.tasks)} scores of tasks" if failures else None
    return UnitResult(ReportFacts(len(models), lacking), files)


def _page_values(job: Job[ReportArgs], report: Values, survey: Values) -> Values:
    story = read_story(job.run_dir, job.args.part_dirs)
    return {
        "name": job.args.source_name,
        "report": report,
        "layers": layer_values(job, survey["moe_layers"], survey["num_experts"]),
        "timeline": timeline_values(story),
        "command": story.command,
        "identities": job.args.identities,
    }


def _target(job: Job[ReportArgs], target: ReportedTarget, shares: Shares) -> Values:
    return {
        "name": target.name,
        "target": target.target,
        "variant": target.variant or None,
        "format": target.format,
        "num_experts": target.num_experts,
        **_narrower(target),
        **({"budget": target.budget, "experts_by_layer": target.num_merged} if target.budget else {}),
        **({"super_experts": target.super_experts} if target.super_experts is not None else {}),
        **({"refits": {layer: vars(one) for layer, one in target.refits.items()}} if target.refits else {}),
        **({"compared_plans": {layer: vars(one) for layer, one in target.compared.items()}} if target.compared else {}),
        **target.assembled,
        "path": target.path,
        "unweighted_clusters": target.unweighted_clusters,
        **({"packing_errors": target.packing_errors} if target.packing_errors else {}),
        **({"coverage": coverage(job.args.domains, shares, job.run_dir / target.plan_dir)} if shares else {}),
        **_scores(job, target.evaluate_dir),
    }


def _narrower(target: ReportedTarget) -> Values:
    """Neurons of an expert and the target that was asked for, where experts are narrower than the source's."""
    if target.num_neurons is None:
        return {}
    return {
        "num_neurons": target.num_neurons,
        "asked": {"experts": target.asked_experts, "width": target.asked_width},
    }


def _scores(job: Job[ReportArgs], evaluate_dir: str | None) -> Values:
    if evaluate_dir is None:
        return {}
    return json.loads((job.run_dir / evaluate_dir / SCORES_FILE).read_text())  # type: ignore[no-any-return]


def _tied_stock_gaps(models: Sequence[Values]) -> list[Values]:
    """Perplexity of stock minus that of tied, for each target exported in both formats; null if either has no perplexity."""
    by_target: dict[str, dict[str, Values]] = {}
    for model in models:
        if "perplexity" in model:
            by_target.setdefault(model["target"], {})[model["format"]] = model
    gaps = []
    for target, formats in by_target.items():
        if len(formats) == 2:
            stock, tied = (formats[name]["perplexity"] for name in ("stock", "tied"))
            gaps.append({"target": target, "perplexity_gap": None if stock is None or tied is None else stock - tied})
    return gaps


def _overlap(job: Job[ReportArgs]) -> Mapping[str, int] | None:
    """Number of evaluation documents, and how many of these are in the calibration text, too; None without evaluation."""
    documents = {
        section: [one for file in files for one in read_documents(job.run_dir / file)]
        for section, files in job.args.documents.items()
    }
    if "evaluation" not in documents:
        return None
    found = documents["evaluation"]
    return {"num_documents": len(found), "num_in_calibration": num_shared(found, documents["calibration"])}


def _certainty(job: Job[ReportArgs]) -> Values:
    """Uncertainty under sampling: mean and largest relative standard error of mean outputs; and for each target and layer, how
    often halves of the data reproduce its labels, and how similar the labels are.

    A standard error that is not finite becomes null and is left out of the mean and the maximum. These are null if no error is
    finite. Errors belong to the calibration, so all variants share them. Methods without a dendrogram are left out.
    """
    with_dendrogram = [(target, target.dendrogram_dir) for target in job.args.targets if target.dendrogram_dir is not None]
    errors = {
        str(layer): [error if math.isfinite(error) else None for error in read_errors(errors_file(job.run_dir / folder, layer))]
        for target, folder in with_dendrogram[:1]
        for layer in target.num_merged
    }
    finite = [error for values in errors.values() for error in values if error is not None]
    return {
        "mean_relative_standard_error": sum(finite) / len(finite) if finite else None,
        "largest_relative_standard_error": max(finite, default=None),
        "relative_standard_errors": errors,
        "stability": {target.target: _stability(job.run_dir / folder, target) for target, folder in with_dendrogram},
    }


def _stability(folder: Path, target: ReportedTarget) -> Mapping[str, Any]:
    rows = {str(layer): read_stability(stability_file(folder, layer), count) for layer, count in target.num_merged.items()}
    return {
        "equal_share": sum(row["equal_share"] for row in rows.values()) / len(rows),
        "mean_adjusted_rand_index": sum(row["mean_adjusted_rand_index"] for row in rows.values()) / len(rows),
        "layers": rows,
    }
