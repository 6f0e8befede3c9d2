"""Facts for the model card of an export. The card is published, so none of them reveals a path on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from stages.contracts.naming import hub_name
from stages.contracts.section import Section
from stages.contracts.settings import Budget, Merging, Refit, RunConfig
from stages.contracts.spec import Run, counts_of, narrowed_to
from stages.contracts.targets import Target
from stages.contracts.tensors import num_neurons
from stages.contracts.text_settings import TextData
from stages.contracts.texts import Text, texts_in


@dataclass(frozen=True)
class CardFacts:
    """Facts for a model card, except those of the written files.

    name: of the export. source: name of the source. base_model: the source's name on the hub, or None. revision: of the source,
    or None. num_experts: experts per layer of the source. experts_text: number of experts kept, in words. source_parameters,
    source_bytes: of the source's weights. router: rule that combines router rows in a stock export. method, method_source:
    title of the method and where it was published. num_neurons: of an expert of the source, and of this model's, where these
    have fewer. calibration, clustering, budget, merging, refit: descriptions; empty if there are no such settings. settings: a
    run file that makes only this checkpoint.
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
    num_neurons: tuple[int, int] | None = None


def card_facts(run: Run, target: Target) -> CardFacts:
    """Facts for the model card of a target."""
    config, variant, model, narrow = run.config, target.variant, run.model, narrowed_to(run, target)
    base_model = hub_name(str(model))
    data = config.calibration
    compares, counts = variant.kind.costs is not None, counts_of(run, target).values()
    kept = target.kept_experts(run.survey.num_experts)
    sampled = f"; un-routed means from {data.sampling.fraction:.0%} of the tokens" if data.sampling else ""
    unread = set() if data.domains else {"domain_weights"}
    clustering = variant.clustering.model_dump(exclude={"num_experts", "method", *unread})
    texts = [_Published.of(text, run.dataset_commit(text.place)) for text in texts_in("calibration", data)]
    return CardFacts(
        name=target.name,
        source=base_model or config.name,
        base_model=base_model,
        revision=model.name if model.parent.name == "snapshots" else config.revision,
        num_experts=run.survey.num_experts,
        experts_text=f"{kept}{f' on average ({min(counts)} to {max(counts)})' if compares else ''}",
        source_parameters=run.survey.num_parameters,
        source_bytes=run.survey.total_bytes,
        router=variant.export.router,
        method=variant.method.title,
        method_source=variant.method.source,
        calibration=f"{data.num_sequences} sequences of {'at most ' * data.has_padding}{data.sequence_length} tokens of "
        f"{', '.join(text.described for text in texts)}, seed {data.seed}{sampled}",
        clustering=", ".join(f"{key} {value}" for key, value in clustering.items()),
        budget=f"{variant.kind.title} ({variant.kind.source})" if compares else "",
        merging=_merging_text(variant.merging) if variant.method.reads_merging else "",
        refit=_refit_text(variant.refit),
        settings={**_settings(config, target, texts), "model": base_model or config.name},
        num_neurons=None if narrow is None else (num_neurons(run.tensors), narrow),
    )


def _merging_text(merging: Merging) -> str:
    return merging.method + (f", neurons aligned by {merging.align}" if merging.align != "none" else "")


def _refit_text(refit: Refit) -> str:
    if refit.mode == "none":
        return ""
    chosen = "whole neurons of each expert, or cluster of experts, are kept; " if refit.neurons == "choose" else ""
    how = "layer after layer" if refit.mode == "sequential" else "every layer on the source's own hidden states"
    shared = "of experts, and of a shared expert where there is one, " if refit.shared_expert else ""
    return f"{chosen}the down projections {shared}are solved anew in closed form, {how} (ridge {refit.ridge})"


@dataclass(frozen=True)
class _Published:
    """A text as the card states it. names: of its files, or of its hub dataset. revision: commit of that dataset, or None.
    packing: whether documents are joined."""

    domain: str
    names: tuple[str, ...]
    revision: str | None
    packing: bool

    @classmethod
    def of(cls, text: Text, commit: str | None) -> "_Published":
        return cls(text.domain, text.data if commit else tuple(Path(name).name for name in text.data), commit, text.packing)

    @property
    def described(self) -> str:
        names = ", ".join(self.names) + (f" (revision {self.revision})" if self.revision else "")
        names += "" if self.packing else ", one document a sequence"
        return f"{self.domain} ({names})" if self.domain else names

    @property
    def located(self) -> dict[str, object]:
        """Settings that name the text without a path."""
        return {"data": self.names, **({"revision": self.revision} if self.revision else {})}


def _published_data(data: TextData, texts: Sequence[_Published]) -> dict[str, object]:
    """Settings of a section that name its texts without a path."""
    if not isinstance(data.data, dict):
        return texts[0].located
    return {"data": {text.domain: data.data[text.domain].model_copy(update=text.located) for text in texts}}


def _settings(config: RunConfig, target: Target, texts: Sequence[_Published]) -> dict[str, JsonValue]:
    """A run file for one target alone. With the same input files, the same command makes the same checkpoint from it."""
    exclude = {
        "run_dir", "cache_dir", "resources", "evaluation", "variants", "clustering", "budget", "merging", "refit", "export",
    }  # fmt: skip
    settings: dict[str, JsonValue] = config.model_dump(mode="json", exclude=exclude, exclude_none=True)
    variant = target.variant
    calibration = config.calibration.model_copy(update=_published_data(config.calibration, texts))
    sections: dict[str, Section] = {
        "calibration": calibration, "clustering": variant.clustering, "export": variant.export,
    }  # fmt: skip
    if variant.budget != Budget():
        sections["budget"] = variant.budget
    if variant.refit.mode != "none":
        sections["refit"] = variant.refit
    if variant.method.reads_merging:
        sections["merging"] = variant.merging
    for name, section in sections.items():
        settings[name] = section.model_dump(mode="json", exclude_none=True)
    clustering, export = settings["clustering"], settings["export"]
    assert isinstance(clustering, dict) and isinstance(export, dict)
    counts = target.num_experts
    asked: JsonValue = list(counts) if isinstance(counts, tuple) else counts
    clustering["num_experts"] = [asked if target.width == 1 else {"experts": asked, "width": target.width}]
    export["formats"] = [target.format]
    return settings
