"""Who answers what tasks ask.

streamed: requests pass through layer shards as a text's sequences do, so that a worker needs the memory of one layer shard. hf:
one worker holds the whole model and the harness's class for transformers models answers. vllm: the harness's class for vLLM.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from typing import Literal

from stages.contracts.errors import InputError
from stages.contracts.settings import RunConfig
from stages.contracts.spec import Run
from stages.contracts.targets import Target
from stages.contracts.text_settings import Evaluation, Harness
from stages.contracts.units import Hold
from stages.engines.vllm_plugin import TIED_CLASSES
from stages.evaluate.generation import check_fits_whole
from stages.evaluate.models import Model
from stages.harness.engine import OPEN_ENGINE, EngineArgs, runs_tied
from stages.harness.notes import TaskNote
from stages.model.tied import class_name

Backend = Literal["streamed", "hf", "vllm"]
_GENERATES = "generate_until"
ROOM_TOKENS = 2048
"""Tokens of a request for which a whole model's memory is counted."""


def backend_of(harness: Harness, kinds: tuple[str, ...]) -> Backend:
    """Who answers a task of these kinds of requests."""
    if harness.backend != "auto":
        return harness.backend
    return "hf" if _GENERATES in kinds else "streamed"


def hold_engine(run: Run, model: Model) -> Hold:
    """vLLM with a model, on the GPUs of one worker."""
    data, resources = run.config.evaluation, run.config.resources
    assert data is not None
    num_gpus = max(1, int(resources.num_gpus or 1))
    args = EngineArgs(
        str(model.folder), run.config.trust_remote_code, data.harness.max_length, data.harness.seed, num_gpus, run.survey.dtype
    )
    return Hold(f"{run.run_dir}/{model.folder}:vllm", OPEN_ENGINE.on(args), str(run.run_dir), f"evaluate {model.name}, vLLM")


def engine_version() -> str:
    """Installed version of vLLM; its builds for other processors go by other names."""
    names = packages_distributions().get("vllm", [])
    return version(names[0]) if names else "not installed"


def backend_lines(data: Evaluation, notes: Mapping[str, TaskNote]) -> Iterator[str]:
    """Which backend answers each task, and why."""
    for name, note in notes.items():
        if data.harness.backend != "auto":
            yield f"backend      {name}: {data.harness.backend}, as evaluation.harness.backend says"
        elif backend_of(data.harness, note.kinds) == "hf":
            yield f"backend      {name}: hf, since it generates text: the whole model on a worker"
        else:
            yield f"backend      {name}: streamed, since it needs log-likelihoods alone: a layer shard on a worker"


def check_backend(config: RunConfig, targets: Sequence[Target], notes: Mapping[str, TaskNote]) -> None:
    """Raise InputError for a backend that cannot run the tasks."""
    data = config.evaluation
    if data is None or not data.tasks:
        return
    if data.harness.backend == "vllm":
        if find_spec("vllm") is None:
            raise InputError(
                "evaluation.harness.backend is vllm, which is not installed; install it, or use streamed, hf or auto"
            )
        tied = [target.name for target in targets if target.format == "tied"]
        if tied and not runs_tied():
            raise InputError(
                f"evaluation.harness.backend is vllm, which runs tied exports such as {tied[0]} with hcsmoe's plug-in alone, "
                "and vLLM finds none; install hcsmoe again (docs/engines.md), set export.formats to [stock], or use auto"
            )
    for name, note in notes.items():
        if data.harness.backend == "streamed" and note.generates:
            raise InputError(
                f"evaluation.harness.backend is streamed, but {name} generates text, which needs the whole model at once; use "
                "hf or auto"
            )


def check_engine(run: Run, data: Evaluation) -> None:
    """Raise InputError if vLLM has no class of its own for the model, and so none for its tied exports."""
    tied = [target.name for target in run.targets if target.format == "tied"]
    if data.tasks and data.harness.backend == "vllm" and tied and class_name(run.survey.architecture) not in TIED_CLASSES:
        known = ", ".join(name.removeprefix(class_name("")) for name in TIED_CLASSES)
        raise InputError(
            f"evaluation.harness.backend is vllm, which cannot run {tied[0]}: hcsmoe's plug-in has tied exports of {known}, "
            f"and the source is a {run.survey.architecture}; set export.formats to [stock], or use auto"
        )


def check_whole_tasks(run: Run, data: Evaluation, notes: Mapping[str, TaskNote]) -> None:
    """Raise InputError if a task needs the whole model and that is too large for a worker."""
    whole = [name for name, note in notes.items() if backend_of(data.harness, note.kinds) != "streamed"]
    if whole:
        place = f"evaluation.tasks ({', '.join(whole)})"
        check_fits_whole(run, data.harness.batch_size * ROOM_TOKENS, place, "leave these tasks out")
