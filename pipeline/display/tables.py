"""The result table."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from pipeline.display.printing import add_row


def perplexity_text(model: Mapping[str, Any]) -> str:
    """A model's perplexity as text: "-" without an evaluation or a loss, "inf" when it overflows a float."""
    if model.get("loss") is None:
        return "-"
    return "inf" if model["perplexity"] is None else f"{model['perplexity']:.3f}"


def experts_text(num_experts: object, num_neurons: int | None) -> str:
    """Experts of a layer; and neurons of each where these are fewer than the source's."""
    return str(num_experts) if num_neurons is None else f"{num_experts} x {num_neurons}"


def _percentage(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def result_table(report: Mapping[str, Any]) -> Table:
    """One row per model of `report.json`, named after its folder. Fits into 80 columns."""
    table = Table(title=None)
    table.add_column("model", no_wrap=True)
    for column in ("experts a layer", "parameters", "bytes on disk", "perplexity"):
        table.add_column(column, justify="right")
    for model in report["models"]:
        count = model["num_experts"]
        by_layer = [*model["experts_by_layer"].values()] if "experts_by_layer" in model else count
        kept = by_layer if isinstance(by_layer, int) else f"{min(by_layer)}-{max(by_layer)}"
        experts = experts_text(kept, model.get("num_neurons"))
        add_row(table, (model["name"], experts, f"{model['parameters']:,}", f"{model['bytes']:,}", perplexity_text(model)))
    return table


def super_expert_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Lines that name the super experts of a report, once for all models that keep them as they are."""
    by_text: dict[str, list[str]] = {}
    for model in report["models"]:
        if "super_experts" in model:
            layers = model["super_experts"].items()
            text = "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in layers)
            by_text.setdefault(text or "none found", []).append(model["name"])
    for text, names in by_text.items():
        yield f"super        {text} (kept as they are in {', '.join(names)})"


def certainty_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Lines on how certain the clusterings are. Empty unless un-routed means come from a sample."""
    certainty = report.get("certainty")
    if certainty is None:
        return
    fraction = report["settings"]["calibration"]["sampling"]["fraction"]
    yield (
        f"sampled      {fraction:.0%} of the tokens for mean outputs: standard error "
        f"{_percentage(certainty['mean_relative_standard_error'])} of a mean, "
        f"at most {_percentage(certainty['largest_relative_standard_error'])}"
    )
    for target, found in certainty["stability"].items():
        yield (
            f"stability    {target}: halves of the data give the same labels in {found['equal_share']:.0%} of draws, "
            f"adjusted Rand index {found['mean_adjusted_rand_index']:.2f}"
        )
