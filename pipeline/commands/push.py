"""`push`: publishes a checkpoint of a finished run on the hub, with a card that states what the run has found out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # httpx's, by whatever name
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from pydantic import JsonValue

from pipeline.api.results import Model, Report
from pipeline.display.quality_picture import Point, quality_picture
from pipeline.errors import RunFailed
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.io.storage import is_remote
from stages.io.untrusted import read_small

_REFUSALS = (401, 403, 404)
_AWAY = (HfHubHTTPError, LocalTokenNotFoundError, TransportError, OfflineModeIsEnabled)
CARD_FILE, PICTURE_FILE, RUN_FILE = "README.md", "quality.svg", "run.yaml"
_RUN_FILE_BLOCK = re.compile(r"\n(`{3,})yaml\n(.*?)\n\1\n", re.DOTALL)


@dataclass(frozen=True)
class Told:
    """What a person has said in spite of a refusal. licence: identifier for the card; empty to take the source's.
    without_licence: publish without any. incomplete: publish although the run lacks scores."""

    licence: str = ""
    without_licence: bool = False
    incomplete: bool = False


def push(run_dir: str, name: str, repo: str, is_private: bool, told: Told) -> str:
    """Upload a checkpoint, its card, its run file and a picture in one commit. Returns the address of the repository.

    The same call continues an upload that was interrupted: what the hub has already is not sent again. huggingface_hub finds
    the token; nothing is written to the run directory. is_private: of a repository that does not exist yet.

    Raises InputError for a checkpoint that is unknown, not whole, lacks scores or a licence, and for a repository that may not
    be written to; RunFailed if the hub cannot be reached.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise InputError(f"{repo} is no name of a repository, org/name: {' '.join(str(e).split())}; write org/name") from e
    if "/" not in repo:
        raise InputError(f"{repo} is no name of a repository; write org/name")
    files = files_of(Report.of(run_dir), name, repo, told)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    api = HfApi()
    try:
        url = api.create_repo(repo, private=is_private or None, exist_ok=True)
        api.create_commit(repo, operations, commit_message=f"{name}, made by hcsmoe")
    except RuntimeError as e:  # names the file that could not be sent
        if not isinstance(e.__cause__, _AWAY):
            raise
        raise _failure(e.__cause__, repo, str(e)) from e
    except _AWAY as e:
        raise _failure(e, repo, "") from e
    return str(url)


def _failure(error: BaseException, repo: str, file: str) -> InputError | RunFailed:
    """An error of the hub as one of ours: somebody may not write there, or the hub did not answer.
    file: what could not be sent, in words."""
    reason = " ".join(f"{file} {error}".split())
    response = getattr(error, "response", None)
    if isinstance(error, LocalTokenNotFoundError) or (response is not None and response.status_code in _REFUSALS):
        return InputError(
            f"{repo} cannot be written to: {reason}; log in with `hf auth login` or HF_TOKEN, as somebody who may write to it"
        )
    return RunFailed(f"the hub did not take {repo}: {reason}; try again later: the same command continues the upload")


def files_of(report: Report, name: str, repo: str, told: Told) -> dict[str, Path | bytes]:
    """Files of a repository by their path in it: those of a checkpoint, with another card, a picture if there are perplexities,
    and the run file. Raises InputError as `push` does."""
    model = report.model(name)
    folder = model.path
    if is_remote(folder):
        raise InputError(f"{folder} is on object storage; copy the run directory to a disk first")
    checkpoint = Checkpoint(folder)
    if checkpoint.total_bytes != model.num_bytes:
        raise InputError(
            f"{folder} has {checkpoint.total_bytes:,} bytes of weights, but {report.path} says {model.num_bytes:,}: it is of "
            "another run; run the run file again"
        )
    failed = report.values.get("failed_tasks")
    if isinstance(failed, list) and failed and not told.incomplete:
        raise InputError(f"{report.path} lacks {len(failed)} scores of tasks; run again, or push with --incomplete")
    card_text = read_small(folder / CARD_FILE).decode()
    points = list(_points(report, model))
    card = _card(card_text, model, report, repo, told, has_picture=bool(points))
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    files[CARD_FILE] = card.encode()
    if points:
        files[PICTURE_FILE] = quality_picture(points).encode()
    if (block := _RUN_FILE_BLOCK.search(card_text)) is not None:
        files[RUN_FILE] = f"{block[2]}\n".encode()
    return files


def _card(text: str, model: Model, report: Report, repo: str, told: Told, has_picture: bool) -> str:
    card = ModelCard(text, ignore_metadata_errors=False)
    data = card.data
    assert isinstance(data, ModelCardData)
    if told.licence:
        data.license = told.licence
    if not data.license and not told.without_licence:
        raise InputError(
            f"{model.path / CARD_FILE} has no entry for a licence, because the source's card has none: give --license ID, or "
            "--no-license to publish without"
        )
    results = list(_eval_results(model, report))
    if results:
        data.model_name = model.name
        data.eval_results = results
    load = ", trust_remote_code=True" if model.format == "tied" else ""
    card.text = card.text.replace(f'"path/to/this/folder"{load}', f'"{repo}"{load}')
    if has_picture:
        card.text += (
            f"\n## Quality against size\n\n![perplexity over bytes of weights, of all models of the run]({PICTURE_FILE})\n"
        )
    return str(card)


def _points(report: Report, model: Model) -> Iterator[Point]:
    """Models with a perplexity: over domains where there are any, as in the run's own tables. None if this model has none."""
    if _perplexity(model) is None:
        return
    for one in (report.source, *report.models):
        if (value := _perplexity(one)) is not None:
            kind = "this" if one is model else "source" if one is report.source else "other"
            yield Point(one.name, one.num_bytes, value, kind)


def _perplexity(model: Model) -> float | None:
    return model.macro_perplexity if model.domain_perplexities else model.perplexity


def _eval_results(model: Model, report: Report) -> Iterator[EvalResult]:
    """Perplexities by text, and scores of tasks, as the hub's metadata has them."""
    texts = _texts(report.settings)
    values = model.domain_perplexities if model.domain_perplexities else {"": model.perplexity}
    for domain, value in values.items():
        if value is not None:
            names = texts.get(domain, ())
            title = f"{domain}: {', '.join(names)}" if domain else ", ".join(names)
            yield EvalResult(
                task_type="text-generation", dataset_type=domain or "held-out-text", dataset_name=title or "held-out text",
                metric_type="perplexity", metric_value=value,
            )  # fmt: skip
    for task, score in model.scores.items():
        yield EvalResult(
            task_type="text-generation", dataset_type=task, dataset_name=task,
            metric_type=score.metric, metric_value=score.value,
        )  # fmt: skip


def _texts(settings: Mapping[str, JsonValue]) -> dict[str, tuple[str, ...]]:
    """Names of the evaluation's files without their folders, or of its hub datasets, by domain ("" without domains)."""
    evaluation = settings.get("evaluation")
    data = evaluation["data"] if isinstance(evaluation, dict) else None
    if isinstance(data, dict):
        found = {name: one["data"] for name, one in data.items() if isinstance(one, dict)}
    else:
        found = {"": data} if data is not None else {}
    return {name: tuple(_public(str(one)) for one in _listed(names)) for name, names in found.items()}


def _listed(names: JsonValue) -> Sequence[JsonValue]:
    return names if isinstance(names, list) else [names]


def _public(name: str) -> str:
    """A path's last part: folders are nobody's business."""
    return name.rstrip("/").rpartition("/")[2]
