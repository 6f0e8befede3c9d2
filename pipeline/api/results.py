"""Typed results of the Python API, read from `report.json` and from what `inspect` finds out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipeline.display.task_table import Score, TaskTable
from pipeline.imports import resolve
from stages.contracts.errors import InputError
from stages.contracts.inspection import CheckpointFacts, TargetSize
from stages.contracts.paths import REPORT_FILE
from stages.contracts.target_settings import NumExperts
from stages.io.storage import absolute
from stages.io.untrusted import read_json


@dataclass(frozen=True)
class Model:
    """A checkpoint with its sizes and scores: the source, or one that a run has made.

    path: its folder. format: "tied" or "stock"; None for the source. variant: of the run file; empty if that lists none.
    num_experts: a layer, or of each layer. num_neurons: of an expert, where it has fewer than the source's. perplexity: over
    all tokens; None without an evaluation, or where it overflows. macro_perplexity: geometric mean over domains; None without
    domains. bits_per_byte: None where the text is unknown. domain_perplexities: by name. scores: of tasks, by name.
    """

    name: str
    path: Path
    format: str | None
    variant: str
    num_experts: NumExperts
    num_neurons: int | None
    num_parameters: int
    num_bytes: int
    perplexity: float | None
    macro_perplexity: float | None
    bits_per_byte: float | None
    domain_perplexities: Mapping[str, float | None]
    scores: Mapping[str, Score]

    def load(self, **options: Any) -> Any:
        """The model as transformers loads it (`transformers.PreTrainedModel`), in evaluation mode.

        options: further arguments of `AutoModelForCausalLM.from_pretrained`, such as device_map. A tied checkpoint's own code,
        which its export holds, is run only if it is what this version writes; else InputError is raised.
        """
        return resolve("stages.model.whole:load_model")(self.path, options)

    def load_tokenizer(self) -> Any:
        """The tokenizer of the checkpoint, as transformers loads it."""
        return resolve("stages.model.whole:load_tokenizer")(self.path)


@dataclass(frozen=True)
class Report:
    """What a finished run has found out. path: of `report.json`. models: that the run has made, in the order of its targets.
    settings: the run file. values: everything that the file holds."""

    path: Path
    source: Model
    models: tuple[Model, ...]
    warnings: tuple[str, ...]
    settings: Mapping[str, JsonValue] = field(repr=False)
    values: Mapping[str, JsonValue] = field(repr=False)

    @classmethod
    def of(cls, where: str | Path) -> "Report":
        """The report of a run directory, or a report file.
        Raises InputError where there is none, or one of another version."""
        place = absolute(where)
        path = place if place.name.endswith(".json") else place / REPORT_FILE
        if not path.exists():
            raise InputError(
                f"{path} does not exist; a run writes it when all stages are finished; run the run file to its end"
            )
        values: Any = read_json(path)
        try:
            tasks = TaskTable.of(values)
            scores = tasks.rows if tasks is not None else {}
            source, *models = (_model(row, path.parent, scores) for row in values["models"])
            return cls(path, source, tuple(models), tuple(values["warnings"]), values["settings"], values)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise InputError(f"{path} is no report of this version; run again, which writes it anew") from e

    def model(self, name: str | None = None) -> Model:
        """The model of this name; without a name the only one that the run has made. Raises InputError otherwise."""
        named = [one for one in self.models if name in (None, one.name)]
        if len(named) == 1:
            return named[0]
        known = ", ".join(one.name for one in self.models)
        if name is None:
            raise InputError(f"the run has made {len(self.models)} models; give the name of one of them: {known}")
        raise InputError(f"the run has made no model named {name}; its models: {known}")


def _model(row: Mapping[str, Any], run_dir: Path, scores: Mapping[str, Mapping[str, Score]]) -> Model:
    num_experts = row["num_experts"]
    by_layer = tuple(row["experts_by_layer"].values()) if "experts_by_layer" in row else None
    return Model(
        name=row["name"],
        path=run_dir / row["path"],
        format=row["format"],
        variant=row.get("variant") or "",
        num_experts=by_layer or (num_experts if isinstance(num_experts, int) else tuple(num_experts)),
        num_neurons=row.get("num_neurons"),
        num_parameters=row["parameters"],
        num_bytes=row["bytes"],
        perplexity=row.get("perplexity"),
        macro_perplexity=row.get("macro_perplexity"),
        bits_per_byte=row.get("bits_per_byte"),
        domain_perplexities={name: one["perplexity"] for name, one in row.get("domains", {}).items()},
        scores=scores.get(row["name"], {}),
    )


@dataclass(frozen=True)
class Result:
    """A finished run. num_run, num_reused: units. elapsed_s: seconds of this call."""

    run_dir: Path
    report: Report
    num_run: int
    num_reused: int
    elapsed_s: float

    @property
    def models(self) -> tuple[Model, ...]:
        """The checkpoints that the run has made."""
        return self.report.models

    def load(self, name: str | None = None, **options: Any) -> Any:
        """A checkpoint as transformers loads it: the one of this name, or the only one. See `Model.load`.
        Raises InputError for an unknown name, or without a name where there are several."""
        return self.report.model(name).load(**options)


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, from its headers. reason: why it is not supported; None if it is. What only a supported checkpoint
    tells is None, or empty, otherwise. sizes: for every number of experts, most first. facts: all that `hcsmoe inspect --json`
    prints."""

    family: str
    reason: str | None
    num_bytes: int
    num_layers: int | None
    num_experts: int | None
    top_k: int | None
    num_parameters: int | None
    dtype: str | None
    sizes: tuple[TargetSize, ...] = field(repr=False)
    facts: Mapping[str, JsonValue] = field(repr=False)

    @classmethod
    def of(cls, facts: CheckpointFacts) -> "Inspection":
        """Of what `inspect` has found."""
        model = facts.model
        return cls(
            family=facts.family,
            reason=facts.reason,
            num_bytes=facts.total_bytes,
            num_layers=model.num_layers if model else None,
            num_experts=model.num_experts if model else None,
            top_k=model.top_k if model else None,
            num_parameters=model.num_parameters if model else None,
            dtype=model.dtype if model else None,
            sizes=tuple(model.targets) if model else (),
            facts=facts.values(),
        )
