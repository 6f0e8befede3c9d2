"""Tasks of a run, from its settings: shared by the stages that make requests and those that answer them."""

import re
from collections.abc import Sequence

from pydantic import TypeAdapter

from stages.contracts.errors import InputError
from stages.contracts.requests import RequestsFacts, TaskArgs
from stages.contracts.settings import RunConfig, task_folder
from stages.contracts.spec import Run

GROUPS = {
    "paper": ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande"),
    "generative": ("gsm8k", "humaneval", "ifeval", "minerva_math500"),
}
"""Our groups. paper: the eight zero-shot tasks of HC-SMoE (arXiv:2410.08589)."""


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, groups of ours replaced by their tasks; each once, in order. Raises InputError for a name that cannot be
    part of a folder's name."""
    found: dict[str, None] = {}
    for name in names:
        if re.fullmatch(r"[\w.+-]+", name, re.ASCII) is None:
            raise InputError(f"evaluation.tasks: {name!r} is no name of a task; write letters, digits and . _ + - alone")
        found |= dict.fromkeys(GROUPS.get(name, (name,)))
    return tuple(found)


def task_part(task: str, model_part: str) -> str:
    """Name of the part of evaluate that scores a model on a task."""
    return f"task-{task}-{model_part}"


def sealed_requests(run: Run) -> dict[str, RequestsFacts]:
    """Facts of the requests of each task; only of tasks whose requests were made or have failed."""
    found = {}
    for unit in run.units("requests"):
        sealed = run.sealed(unit)
        if sealed is not None:
            (task,) = [args.task for args in task_args(run.config) if run.part("requests", args.task).dir == unit.part_dir]
            found[task] = TypeAdapter(RequestsFacts).validate_python(sealed.facts)
    return found


def task_args(config: RunConfig) -> list[TaskArgs]:
    """The tasks of a run, with the settings that their scores depend on. Raises InputError for a malformed name."""
    data = config.evaluation
    if data is None:
        return []
    harness, folder = data.harness, task_folder(config)
    return [
        TaskArgs(
            task=name,
            num_fewshot=harness.num_fewshot,
            limit=harness.limit,
            seed=harness.seed,
            include_path=str(folder) if folder is not None else None,
            max_length=harness.max_length,
            apply_chat_template=harness.apply_chat_template,
            confirm_run_unsafe_code=harness.confirm_run_unsafe_code,
            trust_remote_code=config.trust_remote_code,
            bootstrap_iters=harness.bootstrap_iters,
        )
        for name in expanded(data.tasks)
    ]
