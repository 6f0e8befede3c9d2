"""Loads tasks of lm-evaluation-harness and evaluates a model class on them, as the harness's own command does."""

import contextlib
import io
import json
import logging
import os
import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from stages.contracts.requests import TaskArgs

TaskDict = Mapping[str, Any]
"""What the harness's TaskManager loads: tasks by name, and groups."""


def manager_of(names: tuple[str, ...], include_path: str | None) -> TaskManager:
    """A task manager that knows all names. The harness's own tasks, whose index takes ten seconds, are listed only if a name is
    not among the files in include_path, and once a process while these do not change."""
    if include_path is None:
        return _manager(None, (), True)
    changed = tuple(sorted((str(path), path.stat().st_mtime_ns) for path in Path(include_path).rglob("*.y*ml")))
    own = _manager(include_path, changed, False)
    return own if set(names) <= set(own.all_tasks) else _manager(include_path, changed, True)


@lru_cache(maxsize=4)
def _manager(include_path: str | None, changed: tuple[tuple[str, int], ...], has_defaults: bool) -> TaskManager:
    """changed: when each task file was changed last."""
    return TaskManager(include_path=include_path, include_defaults=has_defaults)


def known_names(names: tuple[str, ...], include_path: str | None) -> frozenset[str]:
    """Those of some names that the harness or files in include_path define."""
    return frozenset(names) & frozenset(manager_of(names, include_path).all_tasks)


def _seed_of(args: TaskArgs) -> int:
    return int(DEFAULT_OTHER_SEED) if args.seed is None else args.seed


def seed_model(args: TaskArgs, number: int) -> None:
    """Seed what a model draws in a slice of that number."""
    torch.manual_seed(_seed_of(args) + number)


def load_task(args: TaskArgs) -> TaskDict:
    """Load one task or group, its data included, with seeds and number of examples as in `lm_eval.simple_evaluate`."""
    other = _seed_of(args)
    random.seed(DEFAULT_RANDOM_SEED if args.seed is None else args.seed)
    np.random.seed(other)  # the generator that tasks of the harness use
    torch.manual_seed(other)
    loaded: TaskDict = manager_of((args.task,), args.include_path).load([args.task])
    for task in loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        if args.num_fewshot is not None and given != 0:
            task.set_config(key="num_fewshot", value=args.num_fewshot)
        elif given is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=other)
    return loaded


def requests_of(loaded: TaskDict, model: LM, args: TaskArgs) -> Mapping[str, list[Any]]:
    """Requests of all tasks, by the method of a model class that answers them."""
    found: dict[str, list[Any]] = {}
    for task in loaded["tasks"].values():
        task.build_all_requests(
            limit=get_sample_size(task, args.limit),
            rank=0,
            world_size=1,
            system_instruction=None,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=True,
            chat_template=model.apply_chat_template if args.apply_chat_template else None,
            tokenizer_name=model.tokenizer_name if args.apply_chat_template else "",
        )
        for instance in task.instances:
            found.setdefault(instance.request_type, []).append(instance)
    return found


def results_of(model: LM, args: TaskArgs, name: str, kind: str) -> dict[str, Any]:
    """The harness's results of one task for a model, in the form that its viewers read. name: of the model. kind: name that the
    harness has for the class that answered, hf or vllm."""
    loaded = load_task(args)
    with _without_forks():
        results: dict[str, Any] = evaluate(
            lm=model,
            task_dict=loaded,
            limit=args.limit,
            bootstrap_iters=args.bootstrap_iters,
            log_samples=False,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=True,
            confirm_run_unsafe_code=args.confirm_run_unsafe_code,
        )
    seed = args.seed
    results["config"] = {
        "model": kind,
        "model_args": {"pretrained": name},
        "limit": args.limit,
        "bootstrap_iters": args.bootstrap_iters,
        "random_seed": DEFAULT_RANDOM_SEED if seed is None else seed,
        **{f"{kind}_seed": DEFAULT_OTHER_SEED if seed is None else seed for kind in ("numpy", "torch", "fewshot")},
    }
    results |= {"model_source": kind, "model_name": name, "lm_eval_version": lm_eval.__version__}
    return results


def results_text(results: Mapping[str, Any]) -> str:
    """Results as the harness writes them, JSON."""
    return json.dumps(results, indent=2, ensure_ascii=False, default=handle_non_serializable)


def facts_of(task: Any, limit: int | float | None) -> tuple[str, str, int, bool]:
    """Of a loaded task: kind of its requests, name of its data set, documents that are evaluated, whether it runs code that a
    model has written. limit: as in `Harness`."""
    num_documents = len(task.eval_docs)
    if limit is not None:
        num_documents = min(num_documents, get_sample_size(task, limit))
    return str(task.OUTPUT_TYPE), str(task.DATASET_PATH), num_documents, bool(getattr(task, "UNSAFE_CODE", False))


@contextlib.contextmanager
def _without_forks() -> Iterator[None]:
    """Let the harness resample in this process, to the same numbers. A process with threads of torch or Ray that forks may
    hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow the harness's progress bars, and what it says below an error."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with _no_output():
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield
