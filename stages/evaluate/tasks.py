"""Tasks of lm-evaluation-harness: parts and units of the stage. Requests are answered shard by shard, whoever answers
(`backends.py`), and then scored from the stored answers."""

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import JsonValue

from stages.contracts.keys import Part
from stages.contracts.requests import RequestsFacts, TaskArgs
from stages.contracts.spec import Run, StageSpec
from stages.contracts.stream_units import Stream, StreamArgs, stream_units
from stages.contracts.tasks import sealed_requests, task_args, task_part
from stages.contracts.text_settings import Evaluation, Harness, TextData
from stages.contracts.units import NoFacts, Unit, UnitCall
from stages.evaluate.backends import ROOM_TOKENS, Backend, backend_of, engine_version, hold_engine
from stages.evaluate.models import OPEN, Model, hold_whole, models, whole_bytes


@dataclass(frozen=True)
class AnswerArgs:
    """Arguments for a shard of requests. It is answered after the last layer. tokens_per_micro_batch: as in `Harness`."""

    stream: StreamArgs
    tokens_per_micro_batch: int


@dataclass(frozen=True)
class TaskScoreArgs:
    """Arguments for the scores of a task whose requests are answered. model, name: checkpoint folder and name of the model.
    requests_dir: of the shards of requests and the slices of prompts, relative to the run directory. backend: who has
    answered."""

    task: TaskArgs
    model: str
    name: str
    requests_dir: str
    num_shards: int
    num_slices: int
    backend: Backend


@dataclass(frozen=True)
class WholeArgs:
    """Arguments for a shard of requests, or a slice of prompts, that a whole model answers. number: of the shard or slice.
    requests_dir: as in `TaskScoreArgs`. batch_size: as in `Harness`."""

    task: TaskArgs
    requests_dir: str
    number: int
    batch_size: int


@dataclass(frozen=True)
class TaskFacts:
    """failure: why there are no scores, or no answers; None if there are."""

    failure: str | None = None


ANSWER = UnitCall("stages.evaluate.task_units:answer_unit", AnswerArgs, NoFacts)
TASK_SCORE = UnitCall("stages.evaluate.task_units:score_task_unit", TaskScoreArgs, TaskFacts)
WHOLE_ANSWERS = UnitCall("stages.evaluate.whole_units:answers_unit", WholeArgs, TaskFacts)
WHOLE_TEXTS = UnitCall("stages.evaluate.whole_units:texts_unit", WholeArgs, TaskFacts)


def task_parts(spec: StageSpec, run: Run, data: Evaluation) -> Iterator[Part]:
    """One part for each task and model."""
    harness = data.harness
    settings: dict[str, JsonValue] = harness.model_dump(include={"backend", "batch_size", "tokens_per_micro_batch"})
    if harness.backend == "vllm":
        settings["vllm"] = engine_version()
    for model in models(run):
        for args in task_args(run.config):
            upstream = {"model": model.made_by, "requests": run.part("requests", args.task)}
            yield run.new_part(spec, task_part(args.task, model.part), settings, upstream)


def task_units(run: Run, data: Evaluation) -> Iterator[Unit]:
    """For each model and task: units that pass shards of requests through layer shards, or a unit for each shard and slice that
    holds the whole model; and one unit for the scores. None for a task whose requests could not be made."""
    found = sealed_requests(run)
    harness = data.harness
    asked = {args.task: (args, found[args.task]) for args in task_args(run.config) if args.task in found}
    streamed = [facts for _, facts in asked.values() if backend_of(harness, facts.kinds) == "streamed"]
    # one partition for all tasks, so that a worker reads each layer shard once for all of them
    longest = max((facts.longest for facts in streamed), default=0)
    for model in models(run):
        for args, facts in asked.values():
            if facts.failure is not None:
                continue
            backend = backend_of(harness, facts.kinds)
            part, requests = run.part("evaluate", task_part(args.task, model.part)), run.part("requests", args.task)
            if backend == "streamed":
                units = _streamed_units(run, part, requests, harness, model, facts, longest)
            else:
                units = list(_whole_units(run, part, requests, harness, model, args, facts, backend))
            yield from units
            score = TaskScoreArgs(
                args, str(model.folder), model.name, requests.dir, facts.num_shards, facts.num_slices, backend
            )
            after = [unit for unit in units if not unit.writes]
            yield run.unit(part, "scores", TASK_SCORE.on(score), f"{model.name}, {args.task}, scores", after=after)


def _streamed_units(
    run: Run, part: Part, requests: Part, harness: Harness, model: Model, facts: RequestsFacts, longest: int
) -> list[Unit]:
    shape = _shape(harness, longest)
    shape = shape.model_copy(update={"num_sequences": facts.num_shards * shape.sequences_per_shard})
    stream = Stream(
        part, requests, shape, str(model.folder), f"{model.name}, {requests.name}, ", OPEN.on,
        lambda stream: ANSWER.on(AnswerArgs(stream, harness.tokens_per_micro_batch)),
        shares_layers=True,
    )  # fmt: skip
    return stream_units(run, stream)


def _shape(harness: Harness, longest: int) -> TextData:
    """Size of a shard of requests, for memory and layer shards."""
    return Evaluation(
        data=("requests",),
        num_sequences=1,
        sequence_length=max(2, longest),
        tokens_per_shard=harness.tokens_per_shard,
        tokens_per_micro_batch=harness.tokens_per_micro_batch,
    )


def _whole_units(
    run: Run, part: Part, requests: Part, harness: Harness, model: Model, args: TaskArgs, facts: RequestsFacts, backend: Backend
) -> Iterator[Unit]:
    hold = hold_engine(run, model) if backend == "vllm" else hold_whole(run, model)
    memory_bytes = whole_bytes(run, harness.batch_size * ROOM_TOKENS)
    label = f"{model.name}, {args.task}, "
    for call, kind, count in ((WHOLE_ANSWERS, "requests", facts.num_shards), (WHOLE_TEXTS, "prompts", facts.num_slices)):
        for number in range(count):
            yield run.unit(
                part, f"{kind}-{number:04d}", call.on(WholeArgs(args, requests.dir, number, harness.batch_size)),
                f"{label}{kind} {number + 1}/{count}", hold=hold, on_worker=True, memory_bytes=memory_bytes,
            )  # fmt: skip
