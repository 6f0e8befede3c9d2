"""What is known of tasks before a run: found in a process of its own, so that the driver loads neither harness nor data.

`python -m stages.harness.notes` reads a `Question` as JSON and prints an `Answer`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from stages.contracts.errors import InputError
from stages.contracts.requests import TaskArgs
from stages.contracts.settings import RunConfig
from stages.contracts.tasks import task_args
from stages.harness.sizes import Size
from stages.io.storage import absolute

if TYPE_CHECKING:
    from stages.harness.sizes import Sizes
    from stages.harness.tasks import TaskDict

_ROOT = Path(__file__).parents[2]
_INSTALL = "install it with `pip install 'hcsmoe[eval]'`"
_OFFLINE = (
    "load the data once where the network is (`HF_DATASETS_CACHE=/shared/datasets lm_eval run --model dummy --tasks NAME "
    "--limit 1`), then "
    "set "
    "HF_DATASETS_CACHE to that folder, on storage that every node reaches, and HF_HUB_OFFLINE=1 for driver and workers"
)


@dataclass(frozen=True)
class TaskNote:
    """What is known of a task without a model.

    num_tasks: tasks in it, more than one of a group. kinds: of their requests. data: names of data sets. num_documents:
    documents that are evaluated. is_unsafe: whether it runs code that a model has written. size: estimated from a sample of
    documents; None if they raise. problem: what they raise.
    """

    num_tasks: int
    kinds: tuple[str, ...]
    data: tuple[str, ...]
    num_documents: int
    is_unsafe: bool
    size: Size | None
    problem: str | None

    @property
    def generates(self) -> bool:
        """Whether a model has to generate text for it."""
        return "generate_until" in self.kinds


@dataclass(frozen=True)
class Question:
    """tasks: those of a run. model: checkpoint folder, for its tokenizer."""

    tasks: tuple[TaskArgs, ...]
    model: str


@dataclass(frozen=True)
class Answer:
    """notes: of tasks by name. unknown: names that the harness does not know. missing: why a task cannot be loaded, by name.
    refusal: why the model's tokenizer cannot be used; None if it can."""

    notes: Mapping[str, TaskNote]
    unknown: tuple[str, ...]
    missing: Mapping[str, str]
    refusal: str | None


_QUESTION, _ANSWER = TypeAdapter(Question), TypeAdapter(Answer)


def notes_of(config: RunConfig, model: Path) -> Mapping[str, TaskNote]:
    """Notes on the tasks of a run, by name. model: checkpoint folder. Raises InputError, one line, when the harness is not
    installed, for unknown tasks, for tasks whose data is missing, and for tasks that run code without the permission for it."""
    tasks = tuple(task_args(config))
    if not tasks:
        return {}
    absent = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
    if absent:
        raise InputError(
            f"evaluation.tasks needs lm-evaluation-harness, but {' and '.join(absent)} is not installed; {_INSTALL}"
        )
    answer = _ask(Question(tasks, str(absolute(model))))
    if answer.unknown:
        raise InputError(
            f"evaluation.tasks: {', '.join(answer.unknown)} is no task of lm-evaluation-harness"
            f"{'' if tasks[0].include_path is None else f' and none of {tasks[0].include_path}'}; choose from `lm_eval ls "
            f"tasks`"
        )
    if answer.missing:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in answer.missing.items())
        raise InputError(f"evaluation.tasks: these cannot be loaded: {reasons}; if data is missing: {_OFFLINE}")
    unsafe = [name for name, note in answer.notes.items() if note.is_unsafe]
    if unsafe and not tasks[0].confirm_run_unsafe_code:
        raise InputError(
            f"evaluation.tasks: {', '.join(unsafe)} runs code that the model writes; set evaluation.harness."
            "confirm_run_unsafe_code to true to allow it, on workers that are safe for it, or leave the task out"
        )
    if answer.refusal is not None:
        raise InputError(answer.refusal)
    return answer.notes


@cache
def _ask(question: Question) -> Answer:
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "stages.harness.notes"], input=_QUESTION.dump_json(question), capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if done.returncode:
        raise InputError(f"evaluation.tasks: lm-evaluation-harness cannot be used: {_last_line(done.stderr)}; {_INSTALL}")
    return _ANSWER.validate_json(done.stdout.splitlines()[-1])


def _last_line(output: bytes) -> str:
    return next(iter(reversed(output.decode(errors="replace").strip().splitlines())), "no reason was given")


def answer_to(question: Question) -> Answer:
    """Load all tasks of a question, and say what is known of them."""
    from stages.harness.sizes import Sizes
    from stages.harness.tasks import known_names, load_task, quiet

    tasks = question.tasks
    known = known_names(tuple(task.task for task in tasks), tasks[0].include_path)
    unknown = tuple(task.task for task in tasks if task.task not in known)
    notes: dict[str, TaskNote] = {}
    missing: dict[str, str] = {}
    try:
        sizes = Sizes(question.model, tasks[0])
    except InputError as e:
        return Answer({}, unknown, {}, str(e))
    for task in tasks:
        if task.task not in known:
            continue
        try:
            with quiet():
                notes[task.task] = _note(load_task(task), task, sizes)
        except Exception as e:  # whatever a task's own code and its data set raise: the user is told all of them at once
            missing[task.task] = " ".join(f"{type(e).__name__}: {e}".split())[:300]
    return Answer(notes, unknown, missing, None)


def _note(loaded: "TaskDict", args: TaskArgs, sizes: "Sizes") -> TaskNote:
    from stages.harness.tasks import facts_of

    found = [facts_of(task, args.limit) for task in loaded["tasks"].values()]
    size = sizes.of(loaded, args)
    return TaskNote(
        len(found),
        tuple(sorted({kind for kind, *_ in found})),
        tuple(dict.fromkeys(data for _, data, *_ in found)),
        sum(num_documents for _, _, num_documents, _ in found),
        any(is_unsafe for *_, is_unsafe in found),
        None if isinstance(size, str) else size,
        size if isinstance(size, str) else None,
    )


def main() -> None:
    """Answer the question on standard input."""
    print(json.dumps(asdict(answer_to(_QUESTION.validate_json(sys.stdin.buffer.read())))))


if __name__ == "__main__":
    main()
