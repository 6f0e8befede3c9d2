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

from pydantic import TypeAdapter

from stages.contracts.errors import InputError
from stages.contracts.requests import TaskArgs
from stages.contracts.settings import RunConfig
from stages.contracts.tasks import task_args

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
    """What is known of a task without a model. num_tasks: tasks in it, more than one of a group. kinds: of their requests.
    data: names of data sets. num_documents: documents that are evaluated. is_unsafe: whether it runs code that a model has
    written."""

    num_tasks: int
    kinds: tuple[str, ...]
    data: tuple[str, ...]
    num_documents: int
    is_unsafe: bool

    @property
    def generates(self) -> bool:
        """Whether a model has to generate text for it."""
        return "generate_until" in self.kinds


@dataclass(frozen=True)
class Answer:
    """notes: of tasks by name. unknown: names that the harness does not know. missing: why a task cannot be loaded, by name."""

    notes: Mapping[str, TaskNote]
    unknown: tuple[str, ...]
    missing: Mapping[str, str]


_QUESTION, _ANSWER = TypeAdapter(tuple[TaskArgs, ...]), TypeAdapter(Answer)


def notes_of(config: RunConfig) -> Mapping[str, TaskNote]:
    """Notes on the tasks of a run, by name. Raises InputError, one line, when the harness is not installed, for unknown tasks,
    for tasks whose data is missing, and for tasks that run code without the permission for it."""
    tasks = tuple(task_args(config))
    if not tasks:
        return {}
    absent = [name for name in ("lm_eval", "accelerate") if find_spec(name) is None]
    if absent:
        raise InputError(
            f"evaluation.tasks needs lm-evaluation-harness, but {' and '.join(absent)} is not installed; {_INSTALL}"
        )
    answer = _ask(tasks)
    if answer.unknown:
        raise InputError(
            f"evaluation.tasks: {', '.join(answer.unknown)} is no task of lm-evaluation-harness"
            f"{'' if tasks[0].include_path is None else f' and none of {tasks[0].include_path}'}; `lm_eval ls tasks` lists them"
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
    return answer.notes


@cache
def _ask(tasks: tuple[TaskArgs, ...]) -> Answer:
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "stages.harness.notes"], input=_QUESTION.dump_json(tasks), capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if done.returncode:
        raise InputError(f"evaluation.tasks: lm-evaluation-harness cannot be used: {_last_line(done.stderr)}; {_INSTALL}")
    return _ANSWER.validate_json(done.stdout.splitlines()[-1])


def _last_line(output: bytes) -> str:
    return next(iter(reversed(output.decode(errors="replace").strip().splitlines())), "no reason was given")


def main() -> None:
    """Answer the question on standard input."""
    from stages.harness.tasks import known_names, load_task, quiet

    tasks = _QUESTION.validate_json(sys.stdin.buffer.read())
    known = known_names(tuple(task.task for task in tasks), tasks[0].include_path)
    unknown = tuple(task.task for task in tasks if task.task not in known)
    notes: dict[str, TaskNote] = {}
    missing: dict[str, str] = {}
    for task in tasks:
        if task.task not in known:
            continue
        try:
            with quiet():
                notes[task.task] = _note(load_task(task))
        except Exception as e:  # whatever a task's own code and its data set raise: the user is told all of them at once
            missing[task.task] = " ".join(f"{type(e).__name__}: {e}".split())[:300]
    print(json.dumps(asdict(Answer(notes, unknown, missing))))


def _note(loaded: Mapping[str, Mapping[str, object]]) -> TaskNote:
    from stages.harness.tasks import facts_of

    found = [facts_of(task) for task in loaded["tasks"].values()]
    return TaskNote(
        len(found),
        tuple(sorted({kind for kind, *_ in found})),
        tuple(dict.fromkeys(data for _, data, *_ in found)),
        sum(num_documents for _, _, num_documents, _ in found),
        any(is_unsafe for *_, is_unsafe in found),
    )


if __name__ == "__main__":
    main()
