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
from stages.harness.notes import notes_of


@dataclass(frozen=True)
class RequestsArgs:
    """model: checkpoint folder, for config and tokenizer. tokens_per_shard: as in `Harness`."""

    model: str
    task: TaskArgs
    tokens_per_shard: int


REQUESTS = UnitCall("stages.requests.units:requests_unit", RequestsArgs, RequestsFacts)


class Requests(StageSpec):
    """Turns the requests of tasks into tokens."""

    name = "requests"
    version = 1
    libraries = ("lm_eval", "datasets", "tokenizers", "transformers")

    def parts(self, run: Run) -> Iterator[Part]:
        """One part for each task."""
        data = run.config.evaluation
        for args in task_args(run.config):
            assert data is not None
            settings: dict[str, JsonValue] = asdict(args)
            if settings.pop("include_path") is not None:
                settings["task_files"] = dict(run.identity("tasks"))
            settings["tokens_per_shard"] = data.harness.tokens_per_shard
            yield run.new_part(self, args.task, settings, {"model": run.part("prepare", "model")})

    def units(self, run: Run) -> Iterator[Unit]:
        """One unit for each task."""
        data = run.config.evaluation
        for args in task_args(run.config):
            assert data is not None
            call = REQUESTS.on(RequestsArgs(str(run.model), args, data.harness.tokens_per_shard))
            yield run.unit(run.part(self.name, args.task), "requests", call, f"{args.task} requests")

    def plan(self, run: Run) -> StagePlan:
        """One unit for each task, and what data it needs."""
        notes = notes_of(run.config)
        lines = [
            f"task         {name}: {note.num_documents:,} documents of {', '.join(note.data)}; {', '.join(note.kinds)}"
            + (f"; {note.num_tasks} tasks" if note.num_tasks > 1 else "")
            for name, note in notes.items()
        ]
        return StagePlan(str(len(notes)) if notes else "", "CPU", lines)

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Refuse tasks that are unknown, or whose data is missing, or that need a permission."""
        notes_of(config)


SPEC = Requests()
