"""How many tokens tasks take, estimated from a few documents of each."""

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from stages.checkpoint.folder import Checkpoint
from stages.contracts.requests import TaskArgs, rows_of

if TYPE_CHECKING:
    from stages.harness.tasks import TaskDict

SAMPLE = 16
"""Documents of each task that are looked at."""


@dataclass(frozen=True)
class Size:
    """Tokens that a model reads, and that it generates at most."""

    num_read: int
    num_generated: int


class Sizes:
    """Estimates for a model. model: checkpoint folder. settings: of any task. Raises InputError if its tokenizer cannot be
    read."""

    def __init__(self, model: str, settings: TaskArgs) -> None:
        from stages.harness.models import Recorder

        self._recorder = Recorder(Checkpoint(model), settings.trust_remote_code, settings.max_length)

    def of(self, loaded: "TaskDict", args: TaskArgs) -> Size | str:
        """Size of a loaded task or group. Where the task's code raises on the sample, which a run would find again and report:
        what it raises."""
        from stages.harness.tasks import facts_of, requests_of

        recorder, num_read, num_generated = self._recorder, 0.0, 0.0
        for name, task in loaded["tasks"].items():
            num_documents = facts_of(task, args.limit)[2]
            sample = min(SAMPLE, num_documents)
            recorder.forget()
            try:
                recorder.ask(requests_of({"tasks": {name: task}}, recorder, replace(args, limit=sample)))
            except Exception as e:  # a task's own code may raise anything
                return " ".join(f"{type(e).__name__}: {e}".split())[:300]
            scale = num_documents / max(1, sample)
            num_read += scale * sum(len(row.token_ids) for row in rows_of(recorder.requests))
            num_read += scale * sum(recorder.num_tokens(prompt) for prompt in recorder.prompts)
            num_generated += scale * sum(recorder.most_generated(prompt) for prompt in recorder.prompts)
        return Size(ceil(num_read), ceil(num_generated))
