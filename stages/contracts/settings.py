"""Sections of the run file: typed, frozen, checked once. Stages read them; the pipeline composes the run file from them.

They share one module because most of them are read by more than one stage.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from stages.contracts.naming import check_name, model_name
from stages.io.storage import absolute

_DRIVE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(/(?!/)|\\)")
"""Matches C:\\runs and s3:/bucket, which would otherwise be taken for a folder below the current one."""
_MAX_BYTES = 1 << 63
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def _parse_bytes(value: Any) -> Any:
    """Parse `"8 GB"` or a number of bytes."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?i?b)?\s*", value.lower())
        if match is None:
            raise ValueError(f"{value!r} is not a size; write for example 8 GB")
        num_bytes = float(match[1]) * _UNITS[match[2] or ""]
        if num_bytes >= _MAX_BYTES:
            raise ValueError(f"{value!r} is larger than any file or memory; write for example 8 GB")
        return int(num_bytes)
    return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


Bytes = Annotated[int, BeforeValidator(_parse_bytes), Field(ge=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Count = Annotated[int, Field(ge=1, le=2**53, strict=True)]


class Section(BaseModel):
    """A section of the run file. It is frozen, and unknown settings are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Format = Literal["text", "chat"]
"""What a document is: a text, or messages that the tokenizer's chat template turns into one."""


class Domain(Section):
    """One of several texts of a section. Settings that are left out are those of the section."""

    data: Names
    text_field: str | None = None
    format: Format | None = None
    revision: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1
    """How much the domain counts where `domain_weights` is `given`, in proportion to the others. It changes no calibration."""


def _as_domain(value: Any) -> Any:
    return {"data": value} if isinstance(value, str | list | tuple) else value


DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=48)]
Domains = Annotated[
    dict[DomainName, Annotated[Domain, BeforeValidator(_as_domain)]],
    Field(min_length=1),
    AfterValidator(lambda domains: dict(sorted(domains.items()))),
]
"""By name, in the order of the names, so that a run does not depend on the order in which a run file lists them."""
_NAMES, _DOMAINS = "union-names", "union-domains"
"""Tags of the two forms of `data`. Validation errors state them among the keys that lead to a value."""


def _kind_of_data(value: Any) -> str:
    return _DOMAINS if isinstance(value, Mapping) else _NAMES


class TextData(Section):
    """A text, or several by domain, and the sequences drawn from it."""

    data: Annotated[Annotated[Names, Tag(_NAMES)] | Annotated[Domains, Tag(_DOMAINS)], Discriminator(_kind_of_data)]
    """Either files and folders of one kind (.txt, .json, .jsonl, also .gz, .bz2, .xz, .zst; .parquet; or token ids in one .npy
    or .safetensors file), or one hub dataset, `org/name[:split]`. File names are literal: patterns are not expanded.
    Or a mapping of domains, `{code: FILES, prose: {data: FILES, weight: 2}}`: sequences are then drawn evenly over the domains,
    and over the documents of each, and what is found out about them is kept by domain."""
    text_field: str = "text"
    """Column of JSON or Parquet that holds the text. Other columns are ignored."""
    format: Format = "text"
    """text: `text_field` holds a text. chat: a row holds `messages` (role, content) or `conversations` (from, value), and
    `tools` if there are any; the tokenizer's chat template turns it into a text."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    num_sequences: Count = 32
    """Sequences in all, of all domains together."""
    sequence_length: Annotated[int, Field(ge=2, strict=True)] = 2048
    """Tokens per sequence."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    tokens_per_shard: Count = 2048
    """Tokens per token shard. The number of shards bounds parallelism; each shard adds a few milliseconds."""
    tokens_per_micro_batch: Count = 2048
    """Tokens that run through a layer at once. Bounds a worker's activations.
    Changing it can change results in the last bits."""

    @property
    def micro_batch(self) -> int:
        """Sequences per micro-batch."""
        return max(1, self.tokens_per_micro_batch // self.sequence_length)

    @property
    def sequences_per_shard(self) -> int:
        """Sequences per token shard: a whole number of micro-batches."""
        return max(1, self.tokens_per_shard // self.sequence_length // self.micro_batch) * self.micro_batch

    @property
    def sequences_by_domain(self) -> dict[str, int]:
        """Sequences of each domain, as even as possible, the first of them having one more. Without domains: all, named ""."""
        names = list(self.data) if isinstance(self.data, dict) else [""]
        each, more = divmod(self.num_sequences, len(names))
        return {name: each + (number < more) for number, name in enumerate(names)}

    @property
    def shards_by_domain(self) -> dict[str, range]:
        """Token shards of each domain. A token shard never holds sequences of two domains. Without domains: all, named ""."""
        shards: dict[str, range] = {}
        first = 0
        for name, count in self.sequences_by_domain.items():
            shards[name] = range(first, first := first - -count // self.sequences_per_shard)
        return shards

    @property
    def num_shards(self) -> int:
        """Number of token shards."""
        return sum(map(len, self.shards_by_domain.values()))

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; empty if the text has none."""
        return tuple(self.data) if isinstance(self.data, dict) else ()

    @model_validator(mode="after")
    def _check_domains(self) -> Self:
        if isinstance(self.data, dict):
            if self.num_sequences < len(self.data):
                raise ValueError(
                    f"num_sequences is {self.num_sequences} but data has {len(self.data)} domains; give each one at least"
                )
            if self.revision is not None:
                raise ValueError("revision is set, but data is a mapping of domains; set it in the domain that it belongs to")
            folded = Counter(name.lower() for name in self.data)
            if twice := [name for name, count in folded.items() if count > 1]:
                raise ValueError(
                    f"data has two domains named {twice[0]}, apart from case; file systems may not tell them apart"
                )
        return self


class Sampling(Section):
    """Settings for computing un-routed means from a sample of tokens. The report then states their uncertainty.
    Routing stays exact."""

    fraction: Annotated[float, Field(gt=0, le=1)]
    """Share of each sequence's tokens, evenly spaced. 1 takes all tokens and still reports the uncertainty of the means."""
    groups: Annotated[int, Field(ge=2, strict=True)] = 8
    """Number of groups of sequences with separate means. Their spread gives standard errors and stability."""


class Calibration(TextData):
    """The calibration set."""

    sampling: Sampling | None = None
    """Omit for exact means over all tokens."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        fewest = min(self.sequences_by_domain.values())
        if self.sampling is not None and self.sampling.groups > fewest:
            of_domain = " of a domain" if self.domains else ""
            raise ValueError(
                f"sampling.groups is {self.sampling.groups} but there are {fewest} sequences{of_domain} to put "
                f"in them; use at most {fewest}"
            )
        return self


class Perplexity(Section):
    """Which tokens of the held-out text are predicted, with how many before them."""

    stride: Count | None = None
    """Tokens between the starts of neighbouring sequences, which then slide over the text in its own order instead of being
    drawn from it. Each token is predicted once, with at least sequence_length - stride tokens before it. Omit to draw."""


class Harness(Section):
    """How tasks of lm-evaluation-harness are run. What is left out is as the harness has it."""

    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Examples before each question, for tasks that do not forbid it."""
    limit: Count | Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None
    """Documents of each task, or their share; for trials only."""
    seed: Annotated[int, Field(ge=0, strict=True)] | None = None
    """Seed of everything that the harness draws."""
    include_path: str | None = None
    """Folder with task files of your own, which every node reaches."""
    backend: Literal["auto", "streamed", "hf", "vllm"] = "auto"
    """Who answers. streamed: layer shards, for log-likelihood requests to a model of any size. hf: the whole model on a worker.
    vllm: where installed. auto: streamed, and hf for tasks that generate text."""
    max_length: Annotated[int, Field(ge=2, strict=True)] | None = None
    """Tokens that a model reads at most. Default: the model's positions."""
    apply_chat_template: bool = False
    """Put questions to the model by its tokenizer's chat template."""
    confirm_run_unsafe_code: bool = False
    """The harness's own permission to run code that a model writes, for tasks that need it."""
    batch_size: Count = 1
    """Requests that hf answers at once."""
    tokens_per_shard: Count = 32768
    """Tokens of a slice of requests that streamed takes through a layer shard at once."""
    tokens_per_micro_batch: Count = 2048
    """Tokens of requests that run through a layer at once in streamed. Changing it can change results in the last bits."""


class Evaluation(TextData):
    """The held-out text."""

    metrics: Annotated[tuple[Literal["perplexity"], ...], BeforeValidator(_as_tuple)] = ("perplexity",)
    perplexity: Perplexity = Perplexity()
    generate: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Prompts that the source and every export continue greedily, for the report to show side by side. Each model is held whole
    by one worker."""
    tasks: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Tasks and groups of lm-evaluation-harness (the extra `eval`), or `paper` or `generative`."""
    harness: Harness = Harness()
    max_new_tokens: Count = 256
    """Maximum number of tokens with which a prompt is continued."""

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        stride = self.perplexity.stride
        if stride is not None and stride > self.sequence_length:
            raise ValueError(
                f"perplexity.stride is {stride} but sequence_length {self.sequence_length}: tokens between two sequences would "
                f"not be predicted; use at most {self.sequence_length}"
            )
        return self


class WidthTarget(Section):
    """A target whose experts have fewer neurons than the source's."""

    experts: Count
    """Experts that each layer keeps."""
    width: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Neurons that each of them keeps, as a share of an expert's, rounded to `refit.width_multiple`."""


def _short(target: Any) -> Any:
    """A target of whole experts as its number."""
    return target.experts if isinstance(target, WidthTarget) and target.width == 1 else target


_NUMBER, _BY_LAYER, _WIDTH = "union-number", "union-layers", "union-width"
"""Tags of the three forms of a target, as those of `data`."""


def _kind_of_target(value: Any) -> str:
    if isinstance(value, Mapping | WidthTarget):
        return _WIDTH
    return _BY_LAYER if isinstance(value, list | tuple) else _NUMBER


Target = Annotated[
    Annotated[Count, Tag(_NUMBER)]
    | Annotated[tuple[Count, ...], Field(min_length=1), Tag(_BY_LAYER)]
    | Annotated[WidthTarget, Tag(_WIDTH)],
    Discriminator(_kind_of_target),
    AfterValidator(_short),
]


class Clustering(Section):
    """Which experts are merged, or which are kept. The settings of each method are a subclass of this section."""

    num_experts: Annotated[tuple[Target, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    """One target per element: the number of experts kept in each layer, or a list with one number per MoE layer (tied only).
    `targets` is the same setting, where an element is `{experts: 8, width: 0.5}`: so many experts, of half their neurons."""
    method: str = "hierarchical"
    """Name of the method."""
    domain_weights: Literal["uniform", "given", "max_min"] = "uniform"
    """How much each domain of `calibration.data` counts: all the same, as their `weight` says, or so that the domain that loses
    most keeps as much saliency as it can. Changing it calibrates nothing anew."""
    protect: Literal["none", "super"] = "none"
    """super: super experts (arXiv:2507.23279) stay as they are, whatever the method: never merged, never dropped."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
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

    method: Literal["frequency", "average", "saliency", "dominant", "fix_dominant", "zipit"] = "frequency"
    """Weights of the cluster members: usage frequency, equal weights, REAP's saliency, or only the most used member. Or, with
    equal weights, by neurons: each neuron is averaged with the most used member's most correlated one (fix_dominant), or the
    most correlated neurons of all members are averaged until as many are left as an expert has (zipit)."""
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
        reasons = {"fix_dominant": "matches neurons itself", "zipit": "matches neurons itself", "dominant": "keeps one member"}
        if self.align != "none" and self.method in reasons:
            raise ValueError(
                f"align is {self.align}, but method {self.method} {reasons[self.method]}; leave align out, or set method to "
                "frequency, average or saliency"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, values_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave align out where it is none, so that keys and cards of runs without it stay as they were."""
        values: dict[str, Any] = values_of(self)
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
    width_multiple: Count = 64
    """The neurons of a narrower expert are a multiple of this, as kernels, tensor parallelism and quantisation blocks need."""

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        unread = sorted(self.model_fields_set - {"mode"})
        if self.mode == "none" and any(getattr(self, name) != type(self).model_fields[name].default for name in unread):
            raise ValueError(f"{unread[0]} is set, but nothing is refitted; set mode to sequential, or leave it out")
        return self


class Export(Section):
    """What an export contains."""

    formats: Annotated[tuple[Literal["tied", "stock"], ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        "tied",
        "stock",
    )
    router: Literal["frequency", "average", "saliency", "dominant", "fitted"] = "frequency"
    """How `stock` combines the router rows of a cluster. fitted: rows by ridge regression that choose a cluster as its members
    were, where they leave a lesser error of the layer on every eighth calibration sequence than those of frequency;
    only with a refit."""
    max_file_bytes: Bytes = 5 * 10**9
    """Maximum size of a weight file. Larger ones are split."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype in which the values of a quantised source are written. Any other source keeps its dtypes."""
    mtp: Literal["drop", "error"] = "drop"
    """Treatment of layers that predict further tokens (MTP), whose experts calibration cannot reach: leave them out of the
    checkpoint, or refuse the model."""

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


class VariantEntry(Section):
    """A variant as a run file lists it: sections of settings that override those of a preset."""

    name: str
    """Part of the names of exports. A hyphen must precede a letter: a hyphen and a digit begin the number of experts."""
    preset: str | None = None
    """Name of a preset, a predefined set of settings."""
    clustering: dict[str, JsonValue] = {}
    budget: dict[str, JsonValue] = {}
    merging: dict[str, JsonValue] = {}
    refit: dict[str, JsonValue] = {}
    export: dict[str, JsonValue] = {}

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if len(value) > 48 or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z][A-Za-z0-9._]*)*", value) is None:
            raise ValueError("use at most 48 letters, digits, dots, underscores, and hyphens that a letter follows")
        return value


def check_target_formats(targets: Sequence[int | tuple[int, ...] | WidthTarget], formats: Sequence[str]) -> None:
    """Raise ValueError for a target that is listed twice, or that a stock checkpoint cannot express."""
    if len(set(targets)) != len(targets):
        listed = [target.model_dump() if isinstance(target, WidthTarget) else target for target in targets]
        raise ValueError(f"clustering.num_experts lists a target twice: {listed}")
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
    clustering: Clustering
    budget: Budget = Budget()
    merging: Merging = Merging()
    refit: Refit = Refit()
    export: Export = Export()
    variants: tuple[Annotated[VariantEntry, BeforeValidator(_by_preset)], ...] | None = None
    """Ways from one calibration to checkpoints. Omit for a single way, given by the sections above. With variants, `clustering`
    contains only `num_experts`; `budget`, `merging` and `refit` belong into each variant. `export` applies to every variant
    that does not change it."""
    evaluation: Evaluation | None = None
    """Omit to skip evaluation."""
    resources: Resources = Resources()

    @field_validator("run_dir", "model", "cache_dir")
    @classmethod
    def _is_a_path(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("must not be empty")
        if value is not None and "\0" in value:
            raise ValueError("must not hold the character NUL")
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


def stride_of(data: TextData) -> int | None:
    """Tokens between the starts of neighbouring sequences of a text; None if its sequences are drawn."""
    return data.perplexity.stride if isinstance(data, Evaluation) else None


def hub_dir(config: RunConfig) -> Path:
    """Folder to which models and datasets of the hub are downloaded."""
    return absolute(config.cache_dir or absolute(config.run_dir) / "source")
