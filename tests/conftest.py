"""Fixtures: tiny checkpoints of real transformers configs, and runs of the whole pipeline over them."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.cli import main
from stages.checkpoint.folder import Checkpoint
from stages.model import survey, trial
from stages.model.adapter import checkpoint_dtype
from tests import HOME
from tests.forks import fork_server
from tests.runs import Call, FinishedRun, write_run_file
from tests.tiny import FAMILIES, save_checkpoint, save_token_ids

REPOSITORY = Path(__file__).parents[1]
# Processes of pytest-xdist take whole files, in this order: a long file that comes last keeps one of them busy alone.
LONGEST_FIRST = (
    "cluster/test_workers.py", "cluster/test_fencing.py", "cluster/test_driver.py", "deploy/test_job_submit.py",
    "storage/test_faults.py", "ray/test_scale.py", "deploy/test_job_stop.py", "cluster/test_partition.py",
    "cluster/test_nodes.py", "pipeline/test_tasks.py", "cluster/test_memory.py", "ray/test_executors.py",
    "storage/test_runs.py",
    "stages/test_families.py", "stages/test_widths.py", "hostile/test_corpus.py", "deploy/test_metrics.py",
    "deploy/test_autoscaling.py",
    "pipeline/test_process.py", "pipeline/test_secrets.py", "cluster/test_storage.py", "ray/test_driver_imports.py",
    "pipeline/test_memory.py", "stages/test_neuron_evidence.py", "pipeline/test_neuron_merges.py", "stages/test_mapped.py",
    "stages/test_report_page.py", "pipeline/test_live_progress.py", "pipeline/test_api.py", "ray/test_given_cluster.py",
    "docs_site/test_blocks.py", "pipeline/test_hub.py", "pipeline/test_hub_data.py", "pipeline/test_fit.py",
    "pipeline/test_push.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    folder = REPOSITORY / "tests"
    items.sort(key=lambda item: places.get(item.path.relative_to(folder).as_posix(), len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported and collected by now stays: the garbage collector need not look at it again and again


def pytest_unconfigure(config: pytest.Config) -> None:
    """Workers of pytest-xdist share the folder with the process that started them, which removes it when all have ended."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def forks() -> Iterator[None]:
    """The process that `tests.forks` forks from."""
    with fork_server():
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_trial_a_config() -> Iterator[None]:
    """Surveys try whether a config's forward goes. Tests survey the same few configs thousands of times: once is enough."""
    tried = set()

    def try_once(checkpoint: Checkpoint) -> None:
        key = json.dumps(checkpoint.config, sort_keys=True), checkpoint_dtype(checkpoint)
        if key not in tried:
            trial.check_forward(checkpoint)
            tried.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey, "check_forward", try_once)
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As a worker computes by default: bits depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Exit code, output and errors of a command, in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["hcsmoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capfd.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random checkpoint of a family, in float32, over several weight files. Not to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        folder = root / f"tiny-{family}"
        if not folder.exists():
            save_checkpoint(folder, family)
        return folder

    return get


@pytest.fixture(scope="session")
def token_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids [8, 32] of the tiny checkpoints' vocabulary."""
    return save_token_ids(tmp_path_factory.mktemp("tokens") / "ids.npy")


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path], token_ids: Path
) -> Callable[[str], FinishedRun]:
    """The whole pipeline, done once a family: to all experts and to half of them, tied and stock. Not to be written to."""
    runs: dict[str, FinishedRun] = {}

    def get(family: str) -> FinishedRun:
        if family not in runs:
            folder = tmp_path_factory.mktemp(f"run-{family}")
            num_experts = FAMILIES[family].num_experts
            run_file = write_run_file(
                folder, tiny_checkpoint(family), token_ids, {"clustering.num_experts": [num_experts, num_experts // 2]}
            )
            runs[family] = FinishedRun.of(run_file)
        return runs[family]

    return get


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference results and larger models, which is not part of the repository."""
    folder = Path(os.environ.get("HCSMOE_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set HCSMOE_SHARED to the folder with golden/")
    return folder
