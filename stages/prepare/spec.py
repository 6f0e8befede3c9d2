"""The stage prepare: makes the survey of the checkpoint, and the token shards of each text."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import JsonValue

from stages.contracts.keys import Part
from stages.contracts.settings import TextData, texts_of
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.survey import unread_lines
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
    """A text and the sequences to draw from it. Settings as in `TextData`.

    place: the section that names the text, for messages. model: checkpoint folder, for the tokenizer. data: paths of files and
    folders.
    """

    place: str
    model: str
    trust_remote_code: bool
    data: tuple[str, ...]
    text_field: str
    num_sequences: int
    sequence_length: int
    seed: int


@dataclass(frozen=True)
class TokensArgs:
    """sequences_per_shard: sequences of a token shard."""

    text: TextArgs
    sequences_per_shard: int


@dataclass(frozen=True)
class TokensFacts:
    """num_tokens: tokens in all token shards."""

    num_tokens: int


SURVEY = UnitCall("stages.prepare.units:survey_unit", SurveyArgs, SurveyFacts)
TOKENS = UnitCall("stages.prepare.units:tokens_unit", TokensArgs, TokensFacts)
SEQUENCES = UnitCall("stages.prepare.units:sequences", TextArgs, TokensFacts)
"""Not a unit: `plan` calls it to check that a text has enough tokens."""


class Prepare(StageSpec):
    """Makes the survey and the token shards."""

    name = "prepare"
    version = 5
    libraries = ("numpy", "tokenizers", "transformers")
    makes_survey = True

    def parts(self, run: Run) -> Iterator[Part]:
        """The survey, and one part for each text."""
        survey = run.new_part(self, SURVEY_PART, {"model": dict(run.identity("model"))}, {})
        yield survey
        for place, data in texts_of(run.config).items():
            yield run.new_part(self, place, _settings(run, place, data), {"model": survey})

    def units(self, run: Run) -> Iterator[Unit]:
        """One unit for the survey, and one per text."""
        yield run.unit(run.part(self.name, SURVEY_PART), "survey", SURVEY.on(SurveyArgs(str(run.model))), "checkpoint")
        for place, data in texts_of(run.config).items():
            args = TokensArgs(_text_args(run, place, data), data.sequences_per_shard)
            yield run.unit(run.part(self.name, place), "tokens", TOKENS.on(args), f"{place} tokens")

    def plan(self, run: Run) -> StagePlan:
        """A unit for the survey and one for each text."""
        return StagePlan(str(1 + len(texts_of(run.config))), "CPU")

    def rehearsals(self, run: Run) -> Iterator[Call]:
        """Draw the sequences of each text whose files are present."""
        for place, data in texts_of(run.config).items():
            if run.dataset_commit(place) is None:
                yield SEQUENCES.on(_text_args(run, place, data))

    def remarks(self, run: Run) -> Iterator[str]:
        """Lines about data in the checkpoint that transformers does not load."""
        survey = run.survey
        return unread_lines(survey.ignored_files, survey.unloaded_tensors, survey.first_unloaded_tensor)


def _settings(run: Run, place: str, data: TextData) -> dict[str, JsonValue]:
    """Settings that determine the token shards.
    `data` and `revision` are left out: they only locate a text, whose content is in its identity."""
    include = {"text_field", "num_sequences", "sequence_length", "seed"}
    settings: dict[str, JsonValue] = data.model_dump(include=include)
    settings |= {
        "data": dict(run.identity(place)),
        "micro_batch": data.micro_batch,
        "sequences_per_shard": data.sequences_per_shard,
    }
    return settings


def _text_args(run: Run, place: str, data: TextData) -> TextArgs:
    return TextArgs(
        place=place,
        model=str(run.model),
        trust_remote_code=run.config.trust_remote_code,
        data=tuple(run.text_files(place)),
        text_field=data.text_field,
        num_sequences=data.num_sequences,
        sequence_length=data.sequence_length,
        seed=data.seed,
    )


SPEC = Prepare()
