"""Tasks of lm-evaluation-harness: what the stage declares of them, and which backend answers.

streamed: requests pass through layer shards as a text's sequences do, so that a worker needs the memory of one layer shard. hf:
one worker holds the whole model and runs the harness on it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from pydantic import JsonValue

from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.requests import RequestsFacts, TaskArgs
from stages.contracts.settings import Evaluation, Harness, RunConfig, TextData
from stages.contracts.spec import Run, StageSpec
from stages.contracts.stream_units import Stream, StreamArgs, stream_units
from stages.contracts.tasks import sealed_requests, task_args, task_part
from stages.contracts.units import NoFacts, Unit, UnitCall
from stages.evaluate.generation import check_fits_whole
from stages.evaluate.models import OPEN, Model, hold_whole, models, whole_bytes
from stages.harness.notes import TaskNote, notes_of

_GENERATES = "generate_until"
_ROOM_TOKENS = 2048
"""Tokens of a request for which a whole model's memory is counted."""


@dataclass(frozen=True)
class AnswerArgs:
    """Arguments for a shard of requests. It is answered after the last layer. tokens_per_micro_batch: as in `Harness`."""

    stream: StreamArgs
    tokens_per_micro_batch: int


@dataclass(frozen=True)
class TaskScoreArgs:
    """Arguments for the scores of a task whose requests are answered. model, name: checkpoint folder and name of the model.
    requests_dir: of the shards of requests, relative to the run directory."""

    task: TaskArgs
    model: str
    name: str
    requests_dir: str
    num_shards: int


@dataclass(frozen=True)
class WholeTaskArgs:
    """Arguments for a task that one worker runs on a whole model. name: of the model. batch_size: as in `Harness`."""

    task: TaskArgs
    name: str
    batch_size: int


@dataclass(frozen=True)
class TaskFacts:
    """failure: why there are no scores; None if there are."""

    failure: str | None = None


ANSWER = UnitCall("stages.evaluate.task_units:answer_unit", AnswerArgs, NoFacts)
TASK_SCORE = UnitCall("stages.evaluate.task_units:score_task_unit", TaskScoreArgs, TaskFacts)
WHOLE_TASK = UnitCall("stages.evaluate.task_units:whole_task_unit", WholeTaskArgs, TaskFacts)


def task_parts(spec: StageSpec, run: Run, data: Evaluation) -> Iterator[Part]:
    """One part for each task and model."""
    harness = data.harness
    settings: dict[str, JsonValue] = harness.model_dump(include={"backend", "batch_size", "tokens_per_micro_batch"})
    for model in models(run):
        for args in task_args(run.config):
            upstream = {"model": model.made_by, "requests": run.part("requests", args.task)}
            yield run.new_part(spec, task_part(args.task, model.part), settings, upstream)


def task_units(run: Run, data: Evaluation) -> Iterator[Unit]:
    """For each model and task: units that pass shards of requests through layer shards, and one unit for the scores; or one
    unit that holds the whole model. None for a task whose requests could not be made."""
    found = sealed_requests(run)
    harness = data.harness
    asked = {args.task: (args, found[args.task]) for args in task_args(run.config) if args.task in found}
    streamed = [facts for _, facts in asked.values() if not _needs_whole(harness, facts.kinds)]
    # one partition for all tasks, so that a worker reads each layer shard once for all of them
    longest = max((facts.longest for facts in streamed), default=0)
    for model in models(run):
        for args, facts in asked.values():
            if facts.failure is not None:
                continue
            if _needs_whole(harness, facts.kinds):
                yield _whole_unit(run, harness, model, args)
            else:
                yield from _streamed_units(run, harness, model, args, facts, longest)


def _streamed_units(
    run: Run, harness: Harness, model: Model, args: TaskArgs, facts: RequestsFacts, longest: int
) -> Iterator[Unit]:
    part, requests = run.part("evaluate", task_part(args.task, model.part)), run.part("requests", args.task)
    shape = _shape(harness, longest)
    shape = shape.model_copy(update={"num_sequences": facts.num_shards * shape.sequences_per_shard})
    stream = Stream(
        part, requests, shape, str(model.folder), f"{model.name}, {args.task}, ", OPEN.on,
        lambda stream: ANSWER.on(AnswerArgs(stream, harness.tokens_per_micro_batch)),
        shares_layers=True,
    )  # fmt: skip
    units = stream_units(run, stream)
    yield from units
    last = [unit for unit in units if not unit.writes]
    score = TaskScoreArgs(args, str(model.folder), model.name, requests.dir, facts.num_shards)
    yield run.unit(part, "scores", TASK_SCORE.on(score), f"{model.name}, {args.task}, scores", after=last)


def _shape(harness: Harness, longest: int) -> TextData:
    """Size of a shard of requests, for memory and layer shards."""
    return Evaluation(
        data=("requests",),
        num_sequences=1,
        sequence_length=max(2, longest),
        tokens_per_shard=harness.tokens_per_shard,
        tokens_per_micro_batch=harness.tokens_per_micro_batch,
    )


def _whole_unit(run: Run, harness: Harness, model: Model, args: TaskArgs) -> Unit:
    return run.unit(
        run.part("evaluate", task_part(args.task, model.part)), "scores",
        WHOLE_TASK.on(WholeTaskArgs(args, model.name, harness.batch_size)), f"{model.name}, {args.task}",
        hold=hold_whole(run, model), on_worker=True, memory_bytes=whole_bytes(run, harness.batch_size * _ROOM_TOKENS),
    )  # fmt: skip


def _needs_whole(harness: Harness, kinds: tuple[str, ...]) -> bool:
    return harness.backend == "hf" or (harness.backend == "auto" and _GENERATES in kinds)


def backend_lines(config: RunConfig) -> Iterator[str]:
    """Which backend runs each task, and why."""
    data = config.evaluation
    notes = notes_of(config) if data is not None else {}
    for name, note in notes.items():
        assert data is not None
        if data.harness.backend != "auto":
            yield f"backend      {name}: {data.harness.backend}, as evaluation.harness.backend says"
        elif _needs_whole(data.harness, note.kinds):
            yield f"backend      {name}: hf, since it generates text: the whole model on a worker"
        else:
            yield f"backend      {name}: streamed, since it needs log-likelihoods alone: a layer shard on a worker"


def check_backend(config: RunConfig) -> None:
    """Raise InputError for a backend that cannot run the tasks."""
    data = config.evaluation
    if data is None or not data.tasks:
        return
    if data.harness.backend == "vllm":
        reason = "is not installed" if find_spec("vllm") is None else "this version does not run tasks on"
        raise InputError(
            f"evaluation.harness.backend is vllm, which {reason}; use streamed, hf or auto, or run `lm_eval --model vllm` on "
            "stock exports"
        )
    for name, note in notes_of(config).items():
        if data.harness.backend == "streamed" and note.generates:
            raise InputError(
                f"evaluation.harness.backend is streamed, but {name} generates text, which needs the whole model at once; use "
                f"hf "
                "or auto"
            )


def check_whole_tasks(run: Run, data: Evaluation) -> None:
    """Raise InputError if a task needs the whole model and that is too large for a worker."""
    notes: Mapping[str, TaskNote] = notes_of(run.config)
    whole = [name for name, note in notes.items() if _needs_whole(data.harness, note.kinds)]
    if whole:
        place = f"evaluation.tasks ({', '.join(whole)})"
        check_fits_whole(run, data.harness.batch_size * _ROOM_TOKENS, place, "leave these tasks out")
