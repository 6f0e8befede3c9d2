"""Quality of all presets, side by side: `python -m bench.quality` writes docs/quality.md.

Every preset brings every trained model of a folder to three quarters and to half of its experts, from one calibration; held-out
text is evaluated, by domain.
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
    """All presets; the random ones with several seeds; slim with widths that fit small experts."""
    fixed: list[Any] = [name for name in presets() if name not in (*RANDOM, "slim")]
    seeded = [
        {"name": f"{name}.{seed}", "preset": name, "clustering": {"seed": seed}} for name in RANDOM for seed in range(SEEDS)
    ]
    return [*fixed, {"name": "slim", "preset": "slim", "refit": {"width_multiple": 8}}, *seeded]


def domains(text: Path, role: str) -> dict[str, str]:
    """Files of a folder by domain. role: `calibration` or `heldout`, with which their names begin."""
    return {path.stem.removeprefix(f"{role}-"): str(path) for path in sorted(text.glob(f"{role}-*.jsonl"))}


def run_model(model: Path, text: Path, work_dir: Path, num_sequences: int, num_evaluated: int) -> Mapping[str, Any]:
    """The report of one model's run. num_sequences, num_evaluated: of each domain, of calibration and of held-out text."""
    num_experts = num_experts_in(Checkpoint(model).config, str(model))
    cut = {"sequence_length": LENGTH, "tokens_per_shard": 8192}
    calibration, heldout = domains(text, "calibration"), domains(text, "heldout")
    values = {
        "model": str(model),
        "run_dir": str(work_dir / model.name),
        "calibration": {"data": calibration, "num_sequences": num_sequences * len(calibration), **cut},
        "clustering": {"num_experts": [num_experts * 3 // 4, num_experts // 2]},
        "variants": variants(),
        "evaluation": {"data": heldout, "num_sequences": num_evaluated * len(heldout), **cut},
    }
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"{model.name}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return run(load_config(path, []), LocalExecutor, Reporter(Console(stderr=True)), RunOptions()).report


def write_page(reports: Mapping[str, Mapping[str, Any]], text: Path, num_sequences: int, num_evaluated: int) -> None:
    """Write docs/quality.md."""
    here = machine()
    lines = [
        "# Quality of the presets",
        "",
        "Made by `python -m bench.quality`; do not edit. Perplexity on held-out text, smaller is better, of small trained "
        f"models. Calibration takes {num_sequences} sequences of {LENGTH} tokens from each domain, evaluation {num_evaluated}: "
        f"{', '.join(domains(text, 'heldout'))}. Pruned checkpoints exist as stock only. Random presets: mean of {SEEDS} seeds "
        "(smallest-largest). What holds for models of this size need not hold for large ones.",
        "",
        f"{here['date']}, commit {here['commit']}, {here['cpu']}, torch {here['torch']}, transformers {here['transformers']}.",
    ]
    for name, report in reports.items():
        lines += ["", f"## {name}"]
        for found in Comparison.all_of(report):
            title = f"{found.measure}: source {found.source:.2f}. A star marks the best."
            lines += ["", title[0].upper() + title[1:], "", *found.markdown()]
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Command line."""
    shared = REPOSITORY.parent / "shared"
    has_shared = (shared / "models").is_dir()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=shared / "models" if has_shared else REPOSITORY / "examples")
    parser.add_argument("--text", type=Path, default=shared / "text" if has_shared else REPOSITORY / "examples" / "text")
    parser.add_argument("--work-dir", type=Path, default=REPOSITORY / "runs" / "quality")
    parser.add_argument("--num-sequences", type=int, default=32, help="of each domain, for calibration")
    parser.add_argument("--num-evaluated", type=int, default=48, help="of each domain, for evaluation")
    args = parser.parse_args()
    models = sorted(path.parent for path in args.models.glob("*/config.json"))
    counts = (args.num_sequences, args.num_evaluated)
    reports = {model.name: run_model(model, args.text, args.work_dir, *counts) for model in models}
    (args.work_dir / "quality.json").write_text(json.dumps(reports))
    write_page(reports, args.text, *counts)


if __name__ == "__main__":
    main()
