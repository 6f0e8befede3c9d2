"""The stage requests: what each task asks of a model, as tokens in shards."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from pydantic import JsonValue

from stages.checkpoint.folder import Checkpoint
from stages.contracts.keys import Part
from stages.contracts.requests import RequestsFacts, TaskArgs
from stages.contracts.settings import RunConfig
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.targets import Target
from stages.contracts.tasks import task_args
from stages.contracts.units import Unit, UnitCall
from stages.contracts.work import forward_flops, work_text
from stages.harness.notes import TaskNote, notes_of


@dataclass(frozen=True)
class RequestsArgs:
    """model: checkpoint folder, for config and tokenizer. tokens_per_shard, prompts_per_slice: as in `Harness`."""

    model: str
    task: TaskArgs
    tokens_per_shard: int
    prompts_per_slice: int


REQUESTS = UnitCall("stages.requests.units:requests_unit", RequestsArgs, RequestsFacts)


class Requests(StageSpec):
    """Turns the requests of tasks into tokens."""

    name = "requests"
    version = 2
    libraries = ("lm_eval", "datasets", "tokenizers", "transformers")

    def parts(self, run: Run) -> Iterator[Part]:
        """One part for each task."""
        data = run.config.evaluation
        for args in task_args(run.config):
            assert data is not None
            settings: dict[str, JsonValue] = asdict(args)
            if settings.pop("include_path") is not None:
                settings["task_files"] = run.identity("tasks")[args.task]
            settings |= data.harness.model_dump(include={"tokens_per_shard", "prompts_per_slice"})
            yield run.new_part(self, args.task, settings, {"model": run.part("prepare", "model")})

    def units(self, run: Run) -> Iterator[Unit]:
        """One unit for each task."""
        data = run.config.evaluation
        for args in task_args(run.config):
            assert data is not None
            harness = data.harness
            call = REQUESTS.on(RequestsArgs(str(run.model), args, harness.tokens_per_shard, harness.prompts_per_slice))
            yield run.unit(run.part(self.name, args.task), "requests", call, f"{args.task} requests")

    def plan(self, run: Run) -> StagePlan:
        """One unit for each task, and what data it needs."""
        notes = notes_of(run.config, run.model)
        lines = [
            f"task         {name}: {note.num_documents:,} documents of {', '.join(note.data)}; {', '.join(note.kinds)}"
            + (f"; {note.num_tasks} tasks" if note.num_tasks > 1 else "")
            + f"; {_size_text(note)}"
            for name, note in notes.items()
        ]
        if notes:
            lines += _work_lines(run, list(notes.values()))
        return StagePlan(str(len(notes)) if notes else "", "CPU", lines)

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Refuse tasks that are unknown, or whose data is missing, or that need a permission."""
        notes_of(config, checkpoint.folder)


def _size_text(note: TaskNote) -> str:
    """Tokens that each model reads and generates."""
    if note.size is None:
        return f"its first documents raise {note.problem}"
    generated = f", and generates at most {note.size.num_generated:,}" if note.size.num_generated else ""
    return f"a model reads about {note.size.num_read:,} tokens{generated}"


def _work_lines(run: Run, notes: Sequence[TaskNote]) -> list[str]:
    """Arithmetic of all tasks and models."""
    num_models = 1 + len(run.targets)
    sizes = [note.size for note in notes if note.size is not None]
    num_generated = sum(size.num_generated for size in sizes)
    num_read = sum(size.num_read for size in sizes)
    flops = num_models * (num_read + num_generated) * forward_flops(run.survey)
    lines = [f"tasks take {num_models} models about {work_text(flops)}"]
    if num_generated:
        lines.append("  generated tokens come one after another and take longer than their arithmetic")
    return lines


SPEC = Requests()
