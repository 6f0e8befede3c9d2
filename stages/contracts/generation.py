"""What a model answers to prompts: one JSON file per model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from stages.io.files import WrittenFile, write_json
from stages.io.untrusted import read_small


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of one prompt.

    text: without special tokens. num_tokens: generated tokens. has_ended: whether the model ended it before the limit.
    repeated_8_grams: share of the generated runs of eight tokens that occurred before; 0 for fewer than eight tokens. is_loop:
    whether that is half of them at least. is_endless_thought: whether a thought was begun and not ended before the limit.
    """

    text: str
    num_tokens: int
    has_ended: bool
    repeated_8_grams: float
    is_loop: bool
    is_endless_thought: bool


@dataclass(frozen=True)
class Answers:
    """uses_chat_template: whether prompts were put to the model by its tokenizer's chat template. answers: one per prompt."""

    uses_chat_template: bool
    answers: Sequence[Answer]


_ANSWERS = TypeAdapter(Answers)


def write_answers(path: Path, answers: Answers) -> WrittenFile:
    """Write the answers of one model."""
    return write_json(path, asdict(answers))


def read_answers(path: Path) -> Answers:
    """Read a file of `write_answers`."""
    return _ANSWERS.validate_json(read_small(path))
