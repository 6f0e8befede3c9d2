"""Quality of all presets, side by side: `python -m bench.quality` writes docs/quality.md.

Every preset brings every trained model of a folder to three quarters and to half of its experts, from one calibration; held-out
text is evaluated.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from bench.measure import REPOSITORY, machine
from pipeline.commands.run import run
from pipeline.config import load_config
from pipeline.display.comparison import Comparison
from pipeline.display.progress import Reporter
from pipeline.driver.run_state import RunOptions
from pipeline.executors.local import LocalExecutor
from pipeline.run.variants import presets
from stages.checkpoint.folder import Checkpoint
from stages.model.families import num_experts_in

PAGE = REPOSITORY / "docs" / "quality.md"
SEEDS = 3
"""Of presets that draw random groups or experts."""
RANDOM = ("random", "random-prune")
LENGTH = 256
"""Tokens of a sequence, as the models were trained."""


def variants() -> list[Any]:
    """All presets; the random ones with several seeds."""
    fixed = [name for name in presets() if name not in RANDOM]
    seeded = [
        {"name": f"{name}.{seed}", "preset": name, "clustering": {"seed": seed}} for name in RANDOM for seed in range(SEEDS)
    ]
    return [*fixed, *seeded]


def run_model(model: Path, text: Path, work_dir: Path, num_sequences: int) -> Mapping[str, Any]:
    """The report of one model's run. num_sequences: of calibration, and as many of evaluation."""
    num_experts = num_experts_in(Checkpoint(model).config, str(model))
    data = {"num_sequences": num_sequences, "sequence_length": LENGTH, "tokens_per_shard": 8192}
    values = {
        "model": str(model),
        "run_dir": str(work_dir / model.name),
        "calibration": {"data": [str(path) for path in sorted(text.glob("calibration-*.jsonl"))], **data},
        "clustering": {"num_experts": [num_experts * 3 // 4, num_experts // 2]},
        "variants": variants(),
        "evaluation": {"data": [str(path) for path in sorted(text.glob("heldout-*.jsonl"))], **data},
    }
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{model.name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return run(load_config(path, []), LocalExecutor, Reporter(Console(stderr=True)), RunOptions()).report


def write_page(reports: Mapping[str, Mapping[str, Any]], text: Path, num_sequences: int) -> None:
    """Write docs/quality.md."""
    here = machine()
    domains = ", ".join(path.stem.partition("-")[2] for path in sorted(text.glob("heldout-*.jsonl")))
    lines = [
        "# Quality of the presets",
        "",
        "Made by `python -m bench.quality`; do not edit. Perplexity on held-out text, smaller is better, of small trained "
        f"models. Calibration and evaluation take {num_sequences} sequences of {LENGTH} tokens each, drawn from these texts: "
        f"{domains}. Pruned checkpoints exist as stock only. Random presets: mean of {SEEDS} seeds (smallest-largest). What "
        "holds for models of this size need not hold for large ones.",
        "",
        f"{here['date']}, commit {here['commit']}, {here['cpu']}, torch {here['torch']}, transformers {here['transformers']}.",
    ]
    for name, report in reports.items():
        found = Comparison.of(report)
        lines += ["", f"## {name}", "", f"Source: perplexity {found.source:.2f}. A star marks the best.", "", *found.markdown()]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    shared = REPOSITORY.parent / "shared"
    has_shared = (shared / "models").is_dir()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=shared / "models" if has_shared else REPOSITORY / "examples")
    parser.add_argument("--text", type=Path, default=shared / "text" if has_shared else REPOSITORY / "examples" / "text")
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "runs" / "quality")
    parser.add_argument("--num-sequences", type=int, default=192)
    args = parser.parse_args()
    models = sorted(path.parent for path in args.models.glob("*/config.json"))
    reports = {model.name: run_model(model, args.text, args.work_dir, args.num_sequences) for model in models}
    (args.work_dir / "quality.json").write_text(json.dumps(reports))
    write_page(reports, args.text, args.num_sequences)


if __name__ == "__main__":
    main()
