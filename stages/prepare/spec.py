"""The stage prepare: makes the survey of the checkpoint, and the token shards of each text."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import JsonValue

from stages.contracts.keys import Part
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.survey import unread_lines
from stages.contracts.text_settings import Format, TextData, stride_of
from stages.contracts.texts import Text, sections_of, texts_in, texts_of, tokens_unit_name
from stages.contracts.units import Call, Unit, UnitCall

SURVEY_PART = "model"


@dataclass(frozen=True)
class SurveyArgs:
    """model: checkpoint folder."""

    model: str


@dataclass(frozen=True)
class SurveyFacts:
    """num_tensors: tensors in the checkpoint."""

    num_tensors: int


@dataclass(frozen=True)
class TextArgs:
    """A text and the sequences to draw from it. Settings as in `TextData`, and `Perplexity.stride`.

    place: where the run file names the text, for messages. model: checkpoint folder, for the tokenizer. data: paths of files
    and folders. is_even: whether the documents get the same number of sequences, as far as possible.
    packing: whether documents are joined. counts_bytes: whether the bytes of the predicted tokens are counted.
    """

    place: str
    model: str
    trust_remote_code: bool
    data: tuple[str, ...]
    text_field: str
    num_sequences: int
    sequence_length: int
    seed: int
    format: Format = "text"
    is_even: bool = False
    stride: int | None = None
    counts_bytes: bool = False
    packing: bool = True


@dataclass(frozen=True)
class TokensArgs:
    """sequences_per_shard: sequences of a token shard. first_shard: number of the text's first token shard. domain: of
    the text; empty if its section has none."""

    text: TextArgs
    sequences_per_shard: int
    first_shard: int = 0
    domain: str = ""


@dataclass(frozen=True)
class TokensFacts:
    """num_tokens: tokens in all token shards, without padding. num_bytes: bytes of UTF-8 that the predicted tokens stand for;
    None if not known or not counted."""

    num_tokens: int
    num_bytes: int | None


SURVEY = UnitCall("stages.prepare.units:survey_unit", SurveyArgs, SurveyFacts)
TOKENS = UnitCall("stages.prepare.units:tokens_unit", TokensArgs, TokensFacts)
SEQUENCES = UnitCall("stages.prepare.units:sequences", TextArgs, TokensFacts)
"""Not a unit: `plan` calls it to check that a text has enough tokens."""


class Prepare(StageSpec):
    """Makes the survey and the token shards."""

    name = "prepare"
    version = 7
    libraries = ("numpy", "tokenizers", "transformers")
    makes_survey = True

    def parts(self, run: Run) -> Iterator[Part]:
        """The survey, and one part for each section that names texts."""
        survey = run.new_part(self, SURVEY_PART, {"model": dict(run.identity("model"))}, {})
        yield survey
        for section, data in sections_of(run.config).items():
            yield run.new_part(self, section, _settings(run, section, data), {"model": survey})

    def units(self, run: Run) -> Iterator[Unit]:
        """One unit for the survey, and one per text."""
        yield run.unit(run.part(self.name, SURVEY_PART), "survey", SURVEY.on(SurveyArgs(str(run.model))), "checkpoint")
        for section, data in sections_of(run.config).items():
            for text in texts_in(section, data):
                args = TokensArgs(_text_args(run, text), data.sequences_per_shard, text.shards.start, text.domain)
                name = tokens_unit_name(text.domain)
                label = f"{section}, {text.domain} tokens" if text.domain else f"{section} tokens"
                yield run.unit(run.part(self.name, section), name, TOKENS.on(args), label)

    def plan(self, run: Run) -> StagePlan:
        """A unit for the survey and one for each text."""
        return StagePlan(str(1 + len(texts_of(run.config))), "CPU")

    def rehearsals(self, run: Run) -> Iterator[Call]:
        """Draw the sequences of each text whose files are present."""
        for place, text in texts_of(run.config).items():
            if run.dataset_commit(place) is None:
                yield SEQUENCES.on(_text_args(run, text))

    def remarks(self, run: Run) -> Iterator[str]:
        """Lines about data in the checkpoint that transformers does not load."""
        survey = run.survey
        return unread_lines(survey.ignored_files, survey.unloaded_tensors, survey.first_unloaded_tensor)


def _settings(run: Run, section: str, data: TextData) -> dict[str, JsonValue]:
    """Settings that determine the token shards of a section.
    `data` and `revision` are left out: they only locate a text, whose content is in its identity. So are the domains' weights,
    which no token depends on."""
    include = {"num_sequences", "sequence_length", "seed"}
    settings: dict[str, JsonValue] = data.model_dump(include=include)
    settings |= {"micro_batch": data.micro_batch, "sequences_per_shard": data.sequences_per_shard}
    if (stride := stride_of(data)) is not None:
        settings["stride"] = stride
    read = {text.domain: _read_settings(run, text) for text in texts_in(section, data)}
    return settings | (read[""] if "" in read else {"domains": dict[str, JsonValue](read)})


def _read_settings(run: Run, text: Text) -> dict[str, JsonValue]:
    settings: dict[str, JsonValue] = {"data": dict(run.identity(text.place)), "text_field": text.text_field}
    settings |= {} if text.format == "text" else {"format": text.format}
    return settings if text.packing else {**settings, "packing": False}


def _text_args(run: Run, text: Text) -> TextArgs:
    return TextArgs(
        place=text.place,
        model=str(run.model),
        trust_remote_code=run.config.trust_remote_code,
        data=tuple(run.text_files(text.place)),
        text_field=text.text_field,
        num_sequences=text.num_sequences,
        sequence_length=text.sequence_length,
        seed=text.seed,
        format=text.format,
        is_even=bool(text.domain),
        stride=stride_of(sections_of(run.config)[text.section]),
        counts_bytes=text.section == "evaluation",
        packing=text.packing,
    )


SPEC = Prepare()
