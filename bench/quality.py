"""Quality of all presets, side by side: `python -m bench.quality` writes docs/quality.md.

Every preset brings every trained model of a folder to three quarters and to half of its experts, from one calibration; held-out
text is evaluated, by domain. With `--left-out` another section is written instead: each domain is left out of calibration once,
and what that costs it under HC-SMoE and under recombine.
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
LEFT_OUT = "# Domains that calibration lacks"
"""Heading of the section that `--left-out` writes; it is the last one of the page."""
COMPARED = ("hc-smoe", "recombine")
LENGTH = 256
"""Tokens of a sequence, as the models were trained."""


def variants() -> list[Any]:
    """All presets; the random ones with several seeds; slim with widths that fit small experts."""
    fixed: list[Any] = [name for name in presets() if name not in (*RANDOM, "slim")]
    seeded = [{"name": name, "preset": name, "seeds": list(range(SEEDS))} for name in RANDOM]
    return [*fixed, {"name": "slim", "preset": "slim", "refit": {"width_multiple": 8}}, *seeded]


def domains(text: Path, role: str) -> dict[str, str]:
    """Files of a folder by domain. role: `calibration` or `heldout`, with which their names begin."""
    return {path.stem.removeprefix(f"{role}-"): str(path) for path in sorted(text.glob(f"{role}-*.jsonl"))}


def run_model(model: Path, text: Path, work_dir: Path, num_sequences: int, num_evaluated: int) -> Mapping[str, Any]:
    """The report of one model's run. num_sequences, num_evaluated: of each domain, of calibration and of held-out text."""
    num_experts = num_experts_in(Checkpoint(model).config, str(model))
    calibration, heldout = domains(text, "calibration"), domains(text, "heldout")
    counts, targets = (num_sequences * len(calibration), num_evaluated * len(heldout)), [num_experts * 3 // 4, num_experts // 2]
    return _run(model, work_dir / model.name, calibration, heldout, counts, targets, variants())


def run_without(
    model: Path, text: Path, work_dir: Path, num_sequences: int, num_evaluated: int, left_out: str
) -> Mapping[str, Any]:
    """The report of a run that calibrates on all domains but one, at half of the experts, and evaluates that one."""
    num_experts = num_experts_in(Checkpoint(model).config, str(model))
    calibration = {name: path for name, path in domains(text, "calibration").items() if name != left_out}
    heldout = {left_out: domains(text, "heldout")[left_out]}
    counts = (num_sequences * len(calibration), num_evaluated)
    run_dir = work_dir / f"{model.name}-without-{left_out}"
    return _run(model, run_dir, calibration, heldout, counts, [num_experts // 2], list(COMPARED))


def _run(
    model: Path, run_dir: Path, calibration: Mapping[str, str], heldout: Mapping[str, str], counts: tuple[int, int],
    num_experts: list[int], variants: list[Any],
) -> Mapping[str, Any]:  # fmt: skip
    """counts: sequences of calibration and of evaluation, of all domains together."""
    cut = {"sequence_length": LENGTH, "tokens_per_shard": 8192}
    values = {
        "model": str(model),
        "run_dir": str(run_dir),
        "calibration": {"data": dict(calibration), "num_sequences": counts[0], **cut},
        "clustering": {"num_experts": num_experts},
        "variants": variants,
        "evaluation": {"data": dict(heldout), "num_sequences": counts[1], **cut},
    }
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return run(load_config(path, []), LocalExecutor, Reporter(Console(stderr=True)), RunOptions()).report


def write_page(reports: Mapping[str, Mapping[str, Any]], text: Path, num_sequences: int, num_evaluated: int) -> None:
    """Write docs/quality.md."""
    lines = [
        "# Quality of the presets",
        "",
        "Made by `python -m bench.quality`; do not edit. Perplexity on held-out text, smaller is better, of small trained "
        f"models. Calibration takes {num_sequences} sequences of {LENGTH} tokens from each domain, evaluation {num_evaluated}: "
        f"{', '.join(domains(text, 'heldout'))}. Pruned checkpoints exist as stock only. Random presets: mean of {SEEDS} seeds "
        "(smallest-largest). What holds for models of this size need not hold for large ones.",
        "",
        _made_on(),
    ]
    for name, report in reports.items():
        lines += ["", f"## {name}"]
        for found in Comparison.all_of(report):
            title = f"{found.measure}: source {found.source:.2f}. A star marks the best."
            lines += ["", title[0].upper() + title[1:], "", *found.markdown()]
    _, heading, left_out = PAGE.read_text().partition(LEFT_OUT) if PAGE.exists() else ("", "", "")
    PAGE.write_text("\n".join(lines) + "\n" + ("\n" if heading else "") + heading + left_out)


def write_left_out(reports: Mapping[str, Mapping[str, Mapping[str, Any]]], num_sequences: int, num_evaluated: int) -> None:
    """Write the section on domains that calibration lacks, and leave the others. reports: by model and domain."""
    kinds = [(format_, variant) for format_ in ("tied", "stock") for variant in COMPARED]
    lines = [
        LEFT_OUT,
        "",
        f"Made by `python -m bench.quality --left-out --num-sequences {num_sequences} --num-evaluated {num_evaluated}`; do not "
        f"edit. Perplexity on the held-out text of a domain at half of the experts, where calibration takes {num_sequences} "
        f"sequences of {LENGTH} tokens from each of the other domains, and none from this one.",
        "",
        _made_on(),
    ]
    for name, by_domain in reports.items():
        titles = [f"{variant}, {format_}" for format_, variant in kinds]
        lines += ["", f"## {name}, a domain left out", "", f"| domain | source | {' | '.join(titles)} |", "|---" * 6 + "|"]
        for domain, report in by_domain.items():
            source, *models = report["models"]
            found = {(one["format"], one["variant"]): one["perplexity"] for one in models}
            cells = [source["perplexity"], *(found[kind] for kind in kinds)]
            lines.append(f"| {domain} | {' | '.join(f'{value:.2f}' for value in cells)} |")
    before = PAGE.read_text().partition(LEFT_OUT)[0].rstrip() if PAGE.exists() else ""
    PAGE.write_text("\n".join([before, "", *lines]).lstrip() + "\n")


def _made_on() -> str:
    here = machine()
    versions = f"torch {here['torch']}, transformers {here['transformers']}"
    return f"{here['date']}, commit {here['commit']}, {here['cpu']}, {versions}."


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
    parser.add_argument("--left-out", action="store_true", help="leave each domain out of calibration once, and nothing else")
    args = parser.parse_args()
    models = sorted(path.parent for path in args.models.glob("*/config.json"))
    counts = (args.num_sequences, args.num_evaluated)
    if args.left_out:
        left_out = {
            model.name: {
                name: run_without(model, args.text, args.work_dir, *counts, name) for name in domains(args.text, "heldout")
            }
            for model in models
        }
        write_left_out(left_out, *counts)
        return
    reports = {model.name: run_model(model, args.text, args.work_dir, *counts) for model in models}
    (args.work_dir / "quality.json").write_text(json.dumps(reports))
    write_page(reports, args.text, *counts)


if __name__ == "__main__":
    main()
