"""Sections of the run file that name texts: what is drawn from them to calibrate, and what to evaluate."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    model_serializer,
    model_validator,
)

from stages.contracts.section import Count, Names, Section, Strings, as_tuple

Format = Literal["text", "chat"]
"""What a document is: a text, or messages that the tokenizer's chat template turns into one."""


class Domain(Section):
    """One of several texts of a section. Settings that are left out are those of the section."""

    data: Names
    """Files and folders of one kind, or one hub dataset, as `data` of the section without domains."""
    text_field: str | None = None
    """As of the section, for this domain."""
    format: Format | None = None
    """As of the section, for this domain."""
    packing: bool | None = None
    """As of the section, for this domain."""
    revision: str | None = None
    """Branch, tag or commit of the domain's hub dataset."""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1
    """How much the domain counts where `domain_weights` is `given`, in proportion to the others. It changes no calibration."""


def _as_domain(value: Any) -> Any:
    return {"data": value} if isinstance(value, str | list | tuple) else value


DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=48)]
Domains = Annotated[
    dict[DomainName, Annotated[Domain, BeforeValidator(_as_domain, json_schema_input_type=str | tuple[str, ...] | Domain)]],
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
    packing: bool = True
    """Whether documents are joined and cut to sequences. false: each sequence is one document, such as a conversation, cut at
    `sequence_length`, or padded at its end with tokens that count nowhere."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    num_sequences: Count = 32
    """Sequences in all, of all domains together."""
    sequence_length: Annotated[int, Field(ge=2, strict=True)] = 2048
    """Tokens per sequence."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Decides which sequences are drawn."""
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
    def has_padding(self) -> bool:
        """Whether sequences of any domain may be padded."""
        given = [domain.packing for domain in self.data.values()] if isinstance(self.data, dict) else [None]
        return not all(self.packing if one is None else one for one in given)

    @model_serializer(mode="wrap")
    def _without_packing(self, values_of: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave packing out where it is true, so that cards of runs without padding stay as they were."""
        values: dict[str, object] = values_of(self)
        return {name: value for name, value in values.items() if (name, value) != ("packing", True)}

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
                    f"data has two domains named {twice[0]}, apart from case; file systems may not tell them apart: rename "
                    f"one of them"
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
    def _check_packing(self) -> Self:
        if self.sampling is not None and self.has_padding:
            raise ValueError(
                "sampling is set, but packing is false: a sample has places in whole sequences, which padding may take; leave "
                "one of them out"
            )
        return self

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
    prompts_per_slice: Count = 32
    """Prompts of a slice: the texts that one unit generates."""
    bootstrap_iters: Annotated[int, Field(ge=2, strict=True)] = 100_000
    """Resamples for the standard errors of metrics that have no formula for theirs."""
    tokens_per_shard: Count = 32768
    """Tokens of a slice of requests that streamed takes through a layer shard at once."""
    tokens_per_micro_batch: Count = 2048
    """Tokens of requests that run through a layer at once in streamed. Changing it can change results in the last bits."""


Metric = Literal["perplexity"]


class Evaluation(TextData):
    """What is measured of the source and all exports: perplexity of a held-out text, answers to prompts, scores of tasks."""

    data: Annotated[Annotated[Strings, Tag(_NAMES)] | Annotated[Domains, Tag(_DOMAINS)], Discriminator(_kind_of_data)] = ()
    """The held-out text, in the forms of a text for calibration. Omit to measure no perplexity."""
    metrics: Annotated[tuple[Metric, ...], BeforeValidator(as_tuple, json_schema_input_type=Metric | tuple[Metric, ...])] = (
        "perplexity",
    )
    """What is computed of the held-out text."""
    perplexity: Perplexity = Perplexity()
    """How the tokens are chosen whose perplexity is measured."""
    generate: Strings = ()
    """Prompts that the source and every export continue greedily, for the report to show side by side. Each model is held whole
    by one worker."""
    tasks: Strings = ()
    """Tasks and groups of lm-evaluation-harness (the extra `eval`), or `paper` or `generative`."""
    harness: Harness = Harness()
    """How tasks are run."""
    max_new_tokens: Count = 256
    """Maximum number of tokens with which a prompt is continued."""

    @property
    def has_text(self) -> bool:
        """Whether there is a held-out text."""
        return bool(self.data)

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if not (self.data or self.generate or self.tasks):
            raise ValueError(
                "it has no data, no tasks and no prompts to generate from; give one of them, or leave the section out"
            )
        if self.perplexity.stride is not None and not self.data:
            raise ValueError(
                "perplexity.stride is set, but there is no data to measure perplexity on; give data, or leave it out"
            )
        for number, prompt in enumerate(self.generate, 1):
            if not prompt.strip():
                raise ValueError(f"prompt {number} of generate is empty; write a text that the models continue")
        return self

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        stride = self.perplexity.stride
        if stride is not None and stride > self.sequence_length:
            raise ValueError(
                f"perplexity.stride is {stride} but sequence_length {self.sequence_length}: tokens between two sequences would "
                f"not be predicted; use at most {self.sequence_length}"
            )
        if stride is not None and self.has_padding:
            raise ValueError(
                f"perplexity.stride is {stride}, which slides over one joined text, but packing is false; leave one of them out"
            )
        return self


def stride_of(data: TextData) -> int | None:
    """Tokens between the starts of neighbouring sequences of a text; None if its sequences are drawn."""
    return data.perplexity.stride if isinstance(data, Evaluation) else None
