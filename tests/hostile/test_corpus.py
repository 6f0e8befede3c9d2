"""Runs the corpus: every bad input is one line and exit code 2, soon, in little memory, with nothing half made."""

import json
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline.cli import main
from pipeline.commands.run import run
from pipeline.config import load_config
from pipeline.display.progress import Reporter
from pipeline.driver.run_state import RunOptions
from pipeline.executors.local import LocalExecutor
from tests.conftest import REPOSITORY
from tests.hostile.case import Case, load_cases
from tests.runs import write_run_file
from tests.tiny import build, save, save_checkpoint, save_token_ids

CASES = load_cases()
EXAMPLE = REPOSITORY / "examples" / "tiny-mixtral"
VOCAB_SIZE = 2304
"""All that the example's tokenizer has."""
MAX_CPU_S = 20
MAX_GROWTH_BYTES = 500_000_000
MAX_MAPPED_BYTES = 8_000_000_000
HALF_MADE = ("models", "report.json", "driver.lock")

Bases = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Folders that hold a checkpoint with a tokenizer, token ids and, by state, its run. Not to be written to."""
    root = tmp_path_factory.mktemp("bases")

    def get(base: str, state: str) -> Path:
        folder = root / f"{base}-{state}"
        if folder.exists():
            return folder
        if state == "new":
            _save(folder, base)
        else:
            shutil.copytree(get(base, "new"), folder)
            config = load_config(write_run_file(folder, folder / "model", folder / "ids.npy", {}), [])
            only = RunOptions(only_stage=None if state == "finished" else "prepare")
            run(config, LocalExecutor, Reporter(Console(quiet=True)), only)
        return folder

    return get


def _save(folder: Path, base: str) -> None:
    if base == "deepseek_v3":
        save(build(base, torch.float32), folder / "model")
    else:
        save_checkpoint(folder / "model", base, vocab_size=VOCAB_SIZE)
    for path in EXAMPLE.glob("tokenizer*"):
        shutil.copy(path, folder / "model")
    save_token_ids(folder / "ids.npy")


@dataclass
class Result:
    """What a person at the command line gets."""

    exit_code: int
    out: str
    err: str


def _status_bytes(key: str) -> int:
    """A size of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@contextmanager
def limits() -> Iterator[None]:
    """Fails when what is done inside takes too much of the processor or of memory."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + MAX_MAPPED_BYTES, hard))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    start_bytes, start_s = _status_bytes("VmRSS"), time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
    assert time.process_time() - start_s < MAX_CPU_S
    assert _status_bytes("VmHWM") - start_bytes < MAX_GROWTH_BYTES


def hcsmoe(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Result:
    """The command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["hcsmoe", *arguments])
    with limits(), pytest.raises(SystemExit) as stopped:
        main()
    captured = capsys.readouterr()
    return Result(int(stopped.value.code or 0), captured.out, captured.err)


def check_refused(case: Case, result: Result, folder: Path) -> None:
    """Exit code 2, one line that says what it must, and nothing half made."""
    assert "Traceback" not in result.err, result.err[-1000:]
    assert result.exit_code == 2, result.err[-1000:]
    *before, error = result.err.splitlines()
    assert error.startswith("error: "), result.err
    assert "Error:" not in error, "a class name is not for the user"
    assert not [line for line in before if line.startswith(("error: ", "failed: "))], result.err
    assert case.began or before == [], "one line and no other"
    assert case.late or [line for line in before if line.startswith("calibrate")] == [], "nothing expensive has begun"
    for part in case.says or []:
        assert part.replace("FOLDER", str(folder)) in error, f"{part!r} is not in: {error}"
    if case.state == "finished":
        return
    found = [path.relative_to(folder).as_posix() for path in (folder / "run").rglob("*")]
    assert case.began or case.state != "new" or found == []
    assert [path for path in found if path.split("/")[-1] in HALF_MADE or path.split("/")[-1].startswith(".")] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.timeout(300)
def test_case(
    case: Case, bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "case"
    case.make(folder, bases(case.base, case.state))
    capsys.readouterr()
    result = hcsmoe(case.arguments(folder), capsys, monkeypatch)
    if case.says is not None:
        check_refused(case, result, folder)
    else:
        assert result.exit_code == 0, result.err[-1000:]
        assert "Traceback" not in result.err
    for part in case.prints or []:
        assert part in result.out, result.out
    for path, text in case.keeps.items():
        assert (folder / path).read_text() == text
    for path in case.absent:
        assert not list(folder.glob(path)), path


def test_every_case_has_a_name_of_its_own_and_expects_something() -> None:
    assert [name for name, times in Counter(case.name for case in CASES).items() if times > 1] == []
    assert [case.name for case in CASES if not case.says and not case.prints] == []


def test_the_run_without_any_change_prints_a_row_a_model(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cases fail for is their change alone."""
    folder = tmp_path / "case"
    case = Case("no change")
    case.make(folder, bases(case.base, case.state))
    result = hcsmoe(case.arguments(folder), capsys, monkeypatch)
    assert result.exit_code == 0, result.err
    report = json.loads((folder / "run" / "report.json").read_text())
    for model in report["models"]:
        (row,) = [line for line in result.out.splitlines() if line.startswith(f"│ {model['name']} ")]
        assert f"{model['parameters']:,}" in row
        assert f"{model['perplexity']:.3f}" in row
    assert str(folder / "run" / "models") in result.out
