"""The run file and its sections: typed, frozen, checked once. Stages read them; the pipeline composes the run file from them.

The sections share one module because most of them are read by more than one stage; those that name texts have their own.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from stages.contracts.naming import check_name, model_name
from stages.contracts.section import Bytes, Count, Section, as_tuple
from stages.contracts.target_settings import AskedTarget, TargetSetting
from stages.contracts.text_settings import Calibration, Evaluation
from stages.io.storage import absolute

_DRIVE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(/(?!/)|\\)")
"""Matches C:\\runs and s3:/bucket, which would otherwise be taken for a folder below the current one."""


class Clustering(Section):
    """Which experts are merged, or which are kept. The settings of each method are a subclass of this section."""

    num_experts: Annotated[
        tuple[TargetSetting, ...],
        BeforeValidator(as_tuple, json_schema_input_type=TargetSetting | tuple[TargetSetting, ...]),
        Field(min_length=1),
    ]
    """One target per element: the number of experts kept in each layer, or a list with one number per MoE layer (tied only).
    `targets` is the same setting, where an element is `{experts: 8, width: 0.5}`: so many experts, of half their neurons; or
    `{share: 0.5}`: half of the experts that the source has; or `{memory: 48 GB}`: as many as fit, beside a cache."""
    method: str = "hierarchical"
    """Name of the method."""
    domain_weights: Literal["uniform", "given", "max_min"] = "uniform"
    """How much each domain of `calibration.data` counts: all the same, as their `weight` says, or so that the domain that loses
    most keeps as much saliency as it can. Changing it calibrates nothing anew."""
    protect: Literal["none", "super"] = "none"
    """super: super experts (arXiv:2507.23279) stay as they are, whatever the method: never merged, never dropped."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, values: SerializerFunctionWrapHandler) -> dict[str, object]:
        """All settings, but `protect` only where it is set: keys and model cards of runs without it stay as they are."""
        return {name: value for name, value in values(self).items() if name != "protect" or value != "none"}

    @model_validator(mode="before")
    @classmethod
    def _long_form(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "targets" not in values:
            return values
        if "num_experts" in values:
            raise ValueError("targets and num_experts are the same setting; leave one of them out")
        return {"num_experts": values["targets"], **{name: value for name, value in values.items() if name != "targets"}}


NEURON_COLUMN = "neuron_activations"
"""Column of evidence by which neurons are compared."""


class Budget(Section):
    """How the experts that are kept are distributed over the layers. `clustering.num_experts` is the mean a layer."""

    kind: str = "uniform"
    """Name of the kind; any other than uniform gives layers different numbers, which only the tied format can express."""
    least: Count | None = None
    """Experts that every layer keeps at least. Never fewer than the router picks for a token."""
    multiple_of: Count = 1
    """Every layer's number of experts is a multiple of this one, such as the number of devices of expert parallelism."""


class Merging(Section):
    """How the experts of a cluster are merged into one."""

    method: Literal["frequency", "average", "saliency", "dominant", "central", "fix_dominant", "zipit"] = "frequency"
    """Weights of the cluster members: usage frequency, equal weights, REAP's saliency, or one member alone, the most used or
    the most central, whose mean output is nearest to the others'. Or, with equal weights, by neurons: each neuron is averaged
    with the most used member's most correlated one (fix_dominant), or the most correlated neurons of all members are averaged
    until as many are left as an expert has (zipit)."""
    align: Literal["none", "weight", "activation"] = "none"
    """Whether the neurons of every member are first brought into the order of the most used member's, so that their weights, or
    their activations on a sample of the calibration tokens, agree best."""

    @property
    def matches_neurons(self) -> bool:
        """Whether members are more than added up neuron by neuron as they are."""
        return self.align != "none" or self.method in ("fix_dominant", "zipit")

    @property
    def requires(self) -> frozenset[str]:
        """Columns of evidence that it reads beyond those of every run."""
        return frozenset({NEURON_COLUMN} if self.matches_neurons and self.align != "weight" else ())

    @model_validator(mode="after")
    def _check_align(self) -> Self:
        matches, keeps = "matches neurons itself", "keeps one member"
        reasons = {"fix_dominant": matches, "zipit": matches, "dominant": keeps, "central": keeps}
        if self.align != "none" and self.method in reasons:
            raise ValueError(
                f"align is {self.align}, but method {self.method} {reasons[self.method]}; leave align out, or set method to "
                "frequency, average or saliency"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, values_of: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave align out where it is none, so that keys and cards of runs without it stay as they were."""
        values: dict[str, object] = values_of(self)
        return {name: value for name, value in values.items() if (name, value) != ("align", "none")}


class Refit(Section):
    """Whether W_down of every merged or kept expert is solved anew, so that each layer's output stays what it was."""

    mode: Literal["none", "sequential", "one_shot"] = "none"
    """sequential: layer after layer, each also making good what the layers before it lost. one_shot: every layer on what the
    source gives it, so that all are solved at once, on many workers."""
    neurons: Literal["keep", "choose"] = "keep"
    """choose: instead of averaging the experts of a cluster, keep whole neurons of theirs, those that are missed most."""
    ridge: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Strength of the pull towards the unsolved values, as a share of the mean diagonal of the moments. auto: of eight
    strengths the one with the least error on every eighth calibration sequence, which nothing else has seen."""
    shared_expert: bool = False
    """Whether W_down of a shared expert is solved together with those of the slots, in families that have one."""
    width_multiple: Count = 64
    """The neurons of a narrower expert are a multiple of this, as kernels, tensor parallelism and quantisation blocks need."""

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        unread = sorted(self.model_fields_set - {"mode"})
        if self.mode == "none" and any(getattr(self, name) != type(self).model_fields[name].default for name in unread):
            raise ValueError(f"{unread[0]} is set, but nothing is refitted; set mode to sequential, or leave it out")
        return self


ExportFormat = Literal["tied", "stock"]


class Export(Section):
    """What an export contains."""

    formats: Annotated[
        tuple[ExportFormat, ...],
        BeforeValidator(as_tuple, json_schema_input_type=ExportFormat | tuple[ExportFormat, ...]),
        Field(min_length=1),
    ] = (
        "tied",
        "stock",
    )
    """stock: the source's own architecture with fewer experts, for every engine. tied: the router keeps all its rows, and a map
    sends each to the expert that stands for it."""
    router: Literal["frequency", "average", "saliency", "dominant", "central", "fitted"] = "frequency"
    """How `stock` combines the router rows of a cluster. fitted: rows by ridge regression that choose a cluster as its members
    were, where they leave a lesser error of the layer on every eighth calibration sequence than those of frequency;
    only with a refit."""
    max_file_bytes: Bytes = 5 * 10**9
    """Maximum size of a weight file. Larger ones are split."""
    dtype: Literal["source", "bfloat16", "float16", "float32"] = "source"
    """How the values of a quantised source are written: packed in the source's own scheme, or as plain numbers of this dtype.
    Any other source keeps its dtypes."""
    mtp: Literal["drop", "merge", "error"] = "drop"
    """Treatment of layers that predict further tokens (MTP), whose experts calibration cannot reach: leave them out of the
    checkpoint; in stock exports give them as many experts as the last MoE layer has, clustered by the distances of their own
    weights, so that engines which draft with them find one number of experts (how well they draft is not measured); or refuse
    the model."""

    @property
    def planned_router(self) -> str:
        """The rule that methods plan with, which a fit starts from."""
        return "frequency" if self.router == "fitted" else self.router


class Resources(Section):
    """Resources of one worker. They do not change results, except that `num_cpus` can change the last bits."""

    num_gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs per worker; fractions share a GPU. Default: 1 if the cluster has GPUs, else 0."""
    num_cpus: Count = 1
    """CPU threads per worker."""
    num_workers: Count | None = None
    """Number of workers that hold a layer shard each. Default: as many as the cluster has room for."""
    worker_memory: Bytes = 8 * 2**30
    """Memory per worker for weights and activations (GPU memory if it has a GPU). It limits the layers of a layer shard."""
    layers_per_shard: Count | None = None
    """Layers per layer shard. Default: as many as fit in `worker_memory`, but at most a quarter of a worker's share of the
    layers. A worker reads its next layer shard while it computes, and short shards let all workers start sooner."""
    max_attempts: Count = 3
    """Maximum number of attempts per unit.
    Deaths of workers count, and so do errors of a file server or store that may pass."""
    unit_timeout_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which a unit counts as hung and is given to another worker. Default: 20 times the median of its kind in
    this run, at least ten minutes; two hours for the first of its kind. Loading a layer shard has a separate limit: 20 times
    the median, at least half an hour; four hours for the first."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of the log files in `logs` of the run directory, one file per process."""


def _by_preset(value: Any) -> Any:
    """Turn a preset's name into a variant of that name."""
    return {"name": value, "preset": value} if isinstance(value, str) else value


Overrides = dict[str, JsonValue]
"""Settings of a section, checked together with those of the preset."""


class VariantEntry(Section):
    """A variant as a run file lists it: sections of settings that override those of a preset."""

    name: str
    """Part of the names of exports. A hyphen must precede a letter: a hyphen and a digit begin the number of experts."""
    preset: str | None = None
    """Name of a preset, a predefined set of settings."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, strict=True)], ...], Field(min_length=1)] | None = Field(
        default=None, exclude=True
    )
    """Make the variant once for each of these seeds of its method, named `NAME.SEED`; `compare` shows their mean and spread."""
    clustering: Overrides = Field(default_factory=dict)
    """Method and its settings; the targets stand in the run file's own section."""
    budget: Overrides = Field(default_factory=dict)
    """How experts are distributed over layers."""
    merging: Overrides = Field(default_factory=dict)
    """How the experts of a cluster are merged."""
    refit: Overrides = Field(default_factory=dict)
    """Whether W_down is solved anew."""
    export: Overrides = Field(default_factory=dict)
    """What differs from the run file's own section."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if len(value) > 48 or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z][A-Za-z0-9._]*)*", value) is None:
            raise ValueError(
                "is no name of a variant; use at most 48 letters, digits, dots, underscores, and hyphens that a letter follows"
            )
        return value

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if self.seeds is not None and "seed" in self.clustering:
            raise ValueError("seeds and clustering.seed are both set; leave one of them out")
        if self.seeds is not None and len(f"{self.name}.{max(self.seeds)}") > 48:
            raise ValueError(f"name and seed, {self.name}.{max(self.seeds)}, have more than 48 characters; use a shorter name")
        return self

    @property
    def by_seed(self) -> "tuple[VariantEntry, ...]":
        """One entry for each seed; the entry itself where it lists none."""
        if self.seeds is None:
            return (self,)
        changes = ({"name": f"{self.name}.{seed}", "clustering": {**self.clustering, "seed": seed}} for seed in self.seeds)
        return tuple(self.model_copy(update={**change, "seeds": None}) for change in changes)


def _by_seed(entries: tuple[VariantEntry, ...]) -> tuple[VariantEntry, ...]:
    return tuple(one for entry in entries for one in entry.by_seed)


def check_target_formats(targets: Sequence[AskedTarget], formats: Sequence[str]) -> None:
    """Raise ValueError for a target that is listed twice, or that a stock checkpoint cannot express."""
    if len(set(targets)) != len(targets):
        listed = [target.model_dump() if isinstance(target, Section) else target for target in targets]
        raise ValueError(f"clustering.num_experts lists a target twice: {listed}; name each once")
    if "stock" in formats and any(isinstance(t, tuple) and len(set(t)) > 1 for t in targets):
        raise ValueError(
            "clustering.num_experts has a target with a different number in each layer, which only the tied format can "
            "express; set export.formats to [tied]"
        )


class RunConfig(Section):
    """A run file."""

    model: str
    """A checkpoint folder, the URL of one on object storage, or a hub model `org/name`."""
    name: str = ""
    """Prefix of the names of exports. Default: the last part of `model`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint, only for its tokenizer. Model classes always come from transformers."""
    cache_dir: str | None = None
    """Folder for downloads from the hub, on storage that every node reaches. Default: `source` in `run_dir`."""
    run_dir: str
    """Folder for all results and state of the run, on storage that every node reaches, or a URL of object storage."""
    calibration: Calibration
    """The text that experts are observed on."""
    clustering: Clustering
    """How many experts are kept, and by which method."""
    budget: Budget = Budget()
    """How the kept experts are distributed over layers."""
    merging: Merging = Merging()
    """How the experts of a cluster become one."""
    refit: Refit = Refit()
    """Whether W_down is solved anew."""
    export: Export = Export()
    """What the checkpoints contain."""
    variants: (
        Annotated[
            tuple[Annotated[VariantEntry, BeforeValidator(_by_preset, json_schema_input_type=str | VariantEntry)], ...],
            AfterValidator(_by_seed),
        ]
        | None
    ) = None
    """Ways from one calibration to checkpoints. Omit for a single way, given by the sections above. With variants, `clustering`
    contains only `num_experts`; `budget`, `merging` and `refit` belong into each variant. `export` applies to every variant
    that does not change it."""
    evaluation: Evaluation | None = None
    """Omit to skip evaluation."""
    resources: Resources = Resources()
    """What a worker may take."""

    @field_validator("run_dir", "model", "cache_dir")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be empty; write a path, or leave it out")
        if value is not None and "\0" in value:
            raise ValueError("must not hold the character NUL; write a path without it")
        if value is not None and _DRIVE.match(value):
            raise ValueError(
                f"names no folder here; write {value.partition(':')[0]}://... for a URL, or a path that begins with /"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, values: Any) -> Any:
        """Set the default name once, here: the name of `.` depends on the current folder, and `run.json` may be read from
        another one."""
        if isinstance(values, dict) and isinstance(values.get("model"), str) and values.get("name") is None:
            return {**values, "name": model_name(values["model"])}
        return values

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        check_name(self.name)
        return self

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        if self.variants == ():
            raise ValueError("variants is an empty list; name one, or leave it out")
        if self.variants is None:
            check_target_formats(self.clustering.num_experts, self.export.formats)
        return self


def task_folder(config: RunConfig) -> Path | None:
    """Folder with the run's own task files, if it has one."""
    given = config.evaluation.harness.include_path if config.evaluation is not None and config.evaluation.tasks else None
    return absolute(given) if given is not None else None


def hub_dir(config: RunConfig) -> Path:
    """Folder to which models and datasets of the hub are downloaded."""
    return absolute(config.cache_dir or absolute(config.run_dir) / "source")
