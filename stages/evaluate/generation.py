"""Greedy answers to the prompts of `evaluation.generate`: what the stage declares of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import JsonValue
from rich import filesize

from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.spec import Run, StageSpec
from stages.contracts.text_settings import Evaluation
from stages.contracts.units import NoFacts, Unit, UnitCall
from stages.evaluate.models import hold_whole, models, whole_bytes

PREFIX = "generate-"
_ROOM_TOKENS = 1024
"""Tokens of a prompt for which memory is counted."""


@dataclass(frozen=True)
class GenerateArgs:
    """prompts, max_new_tokens: as in `Evaluation`. trust_remote_code: for the tokenizer alone."""

    prompts: tuple[str, ...]
    max_new_tokens: int
    trust_remote_code: bool


GENERATE = UnitCall("stages.evaluate.generate:generate_unit", GenerateArgs, NoFacts)


def generation_parts(spec: StageSpec, run: Run, data: Evaluation) -> Iterator[Part]:
    """One part for each model, if there are prompts."""
    if not data.generate:
        return
    settings: dict[str, JsonValue] = {"prompts": list(data.generate), "max_new_tokens": data.max_new_tokens}
    for model in models(run):
        yield run.new_part(spec, f"{PREFIX}{model.part}", settings, {"model": model.made_by})


def generation_units(run: Run, data: Evaluation) -> Iterator[Unit]:
    """One unit for each model."""
    if not data.generate:
        return
    args = GenerateArgs(data.generate, data.max_new_tokens, run.config.trust_remote_code)
    memory_bytes = whole_bytes(run, data.max_new_tokens + _ROOM_TOKENS)
    for model in models(run):
        yield run.unit(
            run.part("evaluate", f"{PREFIX}{model.part}"), "answers", GENERATE.on(args), f"{model.name}, prompts",
            hold=hold_whole(run, model), on_worker=True, memory_bytes=memory_bytes,
        )  # fmt: skip


def check_generation(run: Run, data: Evaluation) -> None:
    """Raise InputError if prompts are given and the model is too large for a worker."""
    if data.generate:
        check_fits_whole(run, data.max_new_tokens + _ROOM_TOKENS, "evaluation.generate", "leave the prompts out")


def check_fits_whole(run: Run, num_tokens: int, place: str, remedy: str) -> None:
    """Raise InputError if the source and a sequence of num_tokens tokens take more than a worker's memory. place, remedy: the
    setting that asks for it, and what else to do, for the message."""
    needed, room = whole_bytes(run, num_tokens), run.config.resources.worker_memory
    if needed > room:
        raise InputError(
            f"{place} needs a whole model in one worker, {filesize.decimal(needed)} for the source, but "
            f"resources.worker_memory is "
            f"{filesize.decimal(room)}; raise it if workers have that much, or {remedy}"
        )
