"""A run directory as a run over many layers and experts leaves it, as far as the page of the report reads it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import average

from stages.contracts.dendrogram import write_dendrogram
from stages.contracts.events import RUN_BEGINS, SEALED, STARTED, Event
from stages.contracts.evidence import Column, LayerEvidence, write_statistics
from stages.contracts.layer_plan import LayerPlan, Member, Slot, write_plan
from stages.contracts.paths import dendrogram_file, domain_dir, plan_file, statistics_file
from stages.contracts.units import Job
from stages.report.spec import LayerRefit, ReportArgs, ReportedTarget

DOMAINS = ("code", "prose", "chat")
COLUMNS = (
    Column("num_routed_tokens", "", dtype="int64"),
    Column("gate_sum", ""),
    Column("output_sum", "", "[D]"),
    Column("gated_output_norm_sum", ""),
)
HOSTILE = "</script><script>fetch('https://example.org/')</script><img src=x onerror=alert(1)>&amp;\u2028"


def large_job(folder: Path, num_layers: int, num_experts: int, num_units: int = 4000) -> Job[ReportArgs]:
    """Files of a run over three domains with two targets: one merged by a dendrogram, one refitted and pruned."""
    chance = np.random.default_rng(0)
    layers, num_kept = range(num_layers), num_experts // 2
    for name in ("calibrate-0", "cluster-0", "pruned-0"):
        (folder / name).mkdir(parents=True)
    for layer in layers:
        for domain in DOMAINS:
            path = statistics_file(domain_dir(folder / "calibrate-0", domain), layer)
            path.parent.mkdir(parents=True, exist_ok=True)
            columns = {
                "num_routed_tokens": chance.integers(0, 1000, num_experts),
                "gate_sum": chance.random(num_experts),
                "output_sum": chance.standard_normal((num_experts, 8)),
                "gated_output_norm_sum": chance.random(num_experts),
            }
            write_statistics(path, LayerEvidence(layer, 8000, 8000, num_experts, columns), COLUMNS, is_sampled=False)
        linkage_Z = average(chance.standard_normal((num_experts, 8)))
        write_dendrogram(dendrogram_file(folder / "cluster-0", layer), linkage_Z)
        pairs = [Slot((2 * one, 2 * one + 1), (Member(2 * one, 0.61), Member(2 * one + 1, 0.39))) for one in range(num_kept)]
        write_plan(plan_file(folder / "cluster-0", layer), LayerPlan(layer, num_experts, tuple(pairs)))
        kept = sorted(chance.choice(num_experts, num_kept, replace=False).tolist())
        single = tuple(Slot((one,), (Member(one),)) for one in kept)
        write_plan(plan_file(folder / "pruned-0", layer), LayerPlan(layer, num_experts, single))
    _write_events(folder, num_units)
    merged = _target("merged", folder="cluster-0", layers=layers, num_kept=num_kept, dendrogram_dir="cluster-0")
    refits = {layer: LayerRefit(0.3 + 0.001 * layer, 0.1, layer == 0) for layer in layers}
    pruned = dataclasses.replace(
        _target("pruned", folder="pruned-0", layers=layers, num_kept=num_kept), refits=refits, super_experts={1: (3,)}
    )
    args = ReportArgs(
        survey_dir="", source_name=HOSTILE, source_path="", source_evaluate_dir=None, source_generate_dir=None,
        targets=(merged, pruned), never_routed={0: (1, 5)}, is_sampled=False, calibrate_dir="calibrate-0", domains=DOMAINS,
        tasks=(), documents={}, settings={}, versions={}, identities={"model": {"model.safetensors": "12:ab"}},
        part_dirs=("calibrate-0", "cluster-0", "pruned-0"),
    )  # fmt: skip
    return Job(folder, folder / "report-0", args)


def _target(name: str, folder: str, layers: range, num_kept: int, dendrogram_dir: str | None = None) -> ReportedTarget:
    return ReportedTarget(
        name=name, target=name, variant=name, format="stock", num_experts=num_kept, num_merged=dict.fromkeys(layers, num_kept),
        path="", assembled={}, plan_dir=folder, evaluate_dir=None, generate_dir=None, dendrogram_dir=dendrogram_dir,
        unweighted_clusters={}, packing_errors={}, final_plan_dir=folder, refits={}, num_neurons=None,
        asked_experts=num_kept, asked_width=1.0, budget="", super_experts=None, compared={},
    )  # fmt: skip


def _write_events(folder: Path, num_units: int) -> None:
    """Units of two workers on each of two nodes, one second each, after half a second of waiting."""
    events = [Event(time=1000.0, event=RUN_BEGINS, command=f"hcsmoe run '{HOSTILE}'")]
    for number in range(num_units):
        path, worker, begin = f"calibrate-0/layers-{number:04d}/tokens-0001", f"worker-{number % 4}", 1000.0 + number // 4 * 1.5
        events.append(Event(time=begin, event=STARTED, stage="calibrate", unit=path, worker=worker))
        sealed = Event(
            time=begin + 1.5, event=SEALED, stage="calibrate", unit=path, host=f"node-{number % 4 // 2}", elapsed_s=1.0,
            open_s=0.4, bytes_read=10, bytes_written=20, peak_bytes=10**9 + number,
        )  # fmt: skip
        events.append(sealed)
    (folder / "events.jsonl").write_text("".join(event.model_dump_json(exclude_defaults=True) + "\n" for event in events))


def page_values(job: Job[ReportArgs], num_layers: int, num_experts: int) -> dict[str, Any]:
    """The page's values beside layers and timeline: of a source and three checkpoints, one of which has no perplexity."""
    settings = {
        "clustering": {"num_experts": [num_experts // 2], "method": "hierarchical"},
        "calibration": {"data": dict.fromkeys(DOMAINS, HOSTILE), "num_sequences": 8, "sequence_length": 1000},
        "evaluation": None,
        "variants": [{"name": "merged"}, {"name": "pruned"}],
    }
    models = [
        {
            "name": name, "target": name, "format": export_format, "num_experts": count, "parameters": size, "bytes": 2 * size,
            "perplexity": perplexity, "variant": name, "loss": 2.0,
            "tasks": {"arc_easy": {"metric": {"metric": "acc", "value": 0.75, "standard_error": 0.012}}},
        }
        for name, export_format, count, size, perplexity in (
            (HOSTILE, None, num_experts, 235_000_000_000, 6.1),
            ("merged", "tied", num_experts // 2, 120_000_000_000, 8.4),
            ("merged", "stock", num_experts // 2, 119_000_000_000, None),
            ("pruned", "stock", num_experts // 2, 120_000_000_000, 9.7),
        )
    ]  # fmt: skip
    return {
        "name": HOSTILE,
        "report": {
            "models": models, "warnings": [f"{HOSTILE}: a warning"], "settings": settings,
            "versions": {"calibrate": {"torch": "2.9"}},
            "tied_stock_gaps": [{"target": "merged", "perplexity_gap": None}],
            "failed_tasks": [{"model": "merged", "task": "piqa", "reason": HOSTILE}],
            "generation": {"prompts": [{"prompt": HOSTILE, "answers": [{"model": "merged", "text": HOSTILE}]}]},
            "plan": {"architecture": "Toy", "num_layers": num_layers, "moe_layers": list(range(num_layers)), "top_k": 8,
                     "num_experts": num_experts},
        },
        "identities": job.args.identities,
    }  # fmt: skip
