"""Facts for the model card of an export. The card is published, so none of them reveals a path on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from stages.contracts.naming import hub_name
from stages.contracts.settings import Budget, Refit, RunConfig, Section
from stages.contracts.spec import Run, counts_of
from stages.contracts.targets import Target


@dataclass(frozen=True)
class CardFacts:
    """Facts for a model card, except those of the written files.

    name: of the export. source: name of the source. base_model: the source's name on the hub, or None. revision: of the source,
    or None. num_experts: experts per layer of the source. experts_text: number of experts kept, in words. source_parameters,
    source_bytes: of the source's weights. router: rule that combines router rows in a stock export. method, method_source:
    title of the method and where it was published. calibration, clustering, budget, merging, refit: descriptions; empty if
    there are no such settings. settings: a run file that makes only this checkpoint.
    """

    name: str
    source: str
    base_model: str | None
    revision: str | None
    num_experts: int
    experts_text: str
    source_parameters: int
    source_bytes: int
    router: str
    method: str
    method_source: str
    calibration: str
    clustering: str
    budget: str
    merging: str
    refit: str
    settings: dict[str, JsonValue]


def card_facts(run: Run, target: Target) -> CardFacts:
    """Facts for the model card of a target."""
    config, variant, commit = run.config, target.variant, run.dataset_commit("calibration")
    model = run.model
    base_model = hub_name(str(model))
    data = config.calibration
    compares, counts = variant.kind.costs is not None, counts_of(run, target).values()
    sampled = f"; un-routed means from {data.sampling.fraction:.0%} of the tokens" if data.sampling else ""
    clustering = variant.clustering.model_dump(exclude={"num_experts", "method"})
    labels = ", ".join(_labels(data.data, commit))
    return CardFacts(
        name=target.name,
        source=base_model or config.name,
        base_model=base_model,
        revision=model.name if model.parent.name == "snapshots" else config.revision,
        num_experts=run.survey.num_experts,
        experts_text=f"{target.num_experts}{f' on average ({min(counts)} to {max(counts)})' if compares else ''}",
        source_parameters=run.survey.num_parameters,
        source_bytes=run.survey.total_bytes,
        router=variant.export.router,
        method=variant.method.title,
        method_source=variant.method.source,
        calibration=f"{data.num_sequences} sequences of {data.sequence_length} tokens of "
        f"{labels}{f' (revision {commit})' if commit else ''}, seed {data.seed}{sampled}",
        clustering=", ".join(f"{key} {value}" for key, value in clustering.items()),
        budget=f"{variant.kind.title} ({variant.kind.source})" if compares else "",
        merging=variant.merging.method if variant.method.reads_merging else "",
        refit=_refit_text(variant.refit),
        settings={**_settings(config, target, commit), "model": base_model or config.name},
    )


def _refit_text(refit: Refit) -> str:
    if refit.mode == "none":
        return ""
    chosen = "whole neurons of each cluster's experts are kept; " if refit.neurons == "choose" else ""
    return f"{chosen}the down projections are solved anew in closed form, layer after layer (ridge {refit.ridge})"


def _labels(data: Sequence[str], commit: str | None) -> list[str]:
    """Names of a text's files, or the name of its hub dataset."""
    return list(data) if commit else [Path(name).name for name in data]


def _settings(config: RunConfig, target: Target, commit: str | None) -> dict[str, JsonValue]:
    """A run file for one target alone. With the same input files, the same command makes the same checkpoint from it."""
    exclude = {
        "run_dir", "cache_dir", "resources", "evaluation", "variants", "clustering", "budget", "merging", "refit", "export",
    }  # fmt: skip
    settings: dict[str, JsonValue] = config.model_dump(mode="json", exclude=exclude, exclude_none=True)
    variant = target.variant
    sections: dict[str, Section] = {"clustering": variant.clustering, "export": variant.export}
    if variant.budget != Budget():
        sections["budget"] = variant.budget
    if variant.refit.mode != "none":
        sections["refit"] = variant.refit
    if variant.method.reads_merging:
        sections["merging"] = variant.merging
    for name, section in sections.items():
        settings[name] = section.model_dump(mode="json", exclude_none=True)
    calibration, clustering, export = settings["calibration"], settings["clustering"], settings["export"]
    assert isinstance(calibration, dict) and isinstance(clustering, dict) and isinstance(export, dict)
    calibration["data"] = list(_labels(config.calibration.data, commit))
    counts = target.num_experts
    clustering["num_experts"] = [counts if isinstance(counts, int) else list(counts)]
    export["formats"] = [target.format]
    if commit:
        calibration["revision"] = commit
    return settings
