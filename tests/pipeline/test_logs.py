"""Logs in a run directory: a file a process, of a bounded size and number, that stops nothing when it cannot be written."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commands.clean import describe_unused
from pipeline.config import load_config
from pipeline.driver.retry import pause_s, persist
from pipeline.state import logs
from tests.pipeline.test_status import shown
from tests.runs import FinishedRun, execute, write_run_file


def test_a_run_logs_what_the_driver_says_and_what_the_worker_does(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun]
) -> None:
    done = finished_run("mixtral")
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), {})
    config = load_config(run_file, [])
    execute(config)
    (path,) = (tmp_path / "run" / "logs").iterdir()
    text = path.read_text()
    assert "INFO calibrate layers 0-0, tokens 1/2: begins" in text
    assert "INFO calibrate layers 0-0: loading" in text
    assert "INFO calibrate: " in text and " units in " in text, "what the driver says"
    assert "prepare" in shown(tmp_path / "run")
    assert list(describe_unused(tmp_path / "run")) == ["0 directories not used by the last run; --yes removes them"]
    size = path.stat().st_size
    execute(load_config(run_file, ["resources.log_level=error", "clustering.linkage=single"]))
    assert path.stat().st_size == size


def test_a_log_that_is_full_is_renamed_in_place_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MAX_BYTES", 1000)
    logs.set_up("info", to_stderr=False)
    for number in range(200):
        logs.log_of(tmp_path).info("%d", number)
    folder = tmp_path / "logs"
    assert sorted(os.listdir(folder)) == [logs.file_name(), f"{logs.file_name()}.1"]
    assert all(path.stat().st_size < 1100 for path in folder.iterdir())
    assert (folder / logs.file_name()).read_text().endswith(" INFO 199\n")


def test_the_newest_logs_are_kept(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for number in range(105):
        path = tmp_path / "logs" / f"host-{number}.log"
        path.touch()
        os.utime(path, (number, number))
    logs.prune(tmp_path)
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"host-{number}.log" for number in range(5, 105)}


def test_a_host_name_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "../a host/" + "x" * 300)
    name = logs.file_name()
    assert "/" not in name and name.startswith(".._a_host_xxx") and len(name) < 130


def test_a_log_that_cannot_be_written_is_said_once_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("in the way")
    logs.set_up("info", to_stderr=False)
    for _ in range(3):
        logs.log_of(tmp_path).info("unit")
    assert capsys.readouterr().err.count(f"cannot write the log {tmp_path / 'logs' / logs.file_name()}") == 1


def test_nothing_is_written_for_a_run_directory_that_is_gone_or_on_object_storage(tmp_path: Path) -> None:
    logs.set_up("info", to_stderr=False)
    logs.log_of(tmp_path / "gone").info("unit")
    logs.log_of("s3://bucket/run").info("unit")
    logs.log_of("").info("unit")
    assert list(tmp_path.iterdir()) == []
    assert not Path("s3:").exists()
    assert logging.getLogger("hcsmoe").propagate is False


class Away:
    """A storage that is away for a number of calls."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "done"


def test_what_the_driver_does_itself_is_tried_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    reset = ConnectionResetError(104, "Connection reset by peer")
    assert persist(Away(reset, reset), 3, said.append) == "done"
    assert slept == [5.0, 30.0]
    assert said == [
        "ConnectionResetError: [Errno 104] Connection reset by peer; trying again in 5 s (2 of 3)",
        "ConnectionResetError: [Errno 104] Connection reset by peer; trying again in 30 s (3 of 3)",
    ]
    with pytest.raises(ConnectionResetError):
        persist(Away(reset, reset, reset), 3, said.append)
    with pytest.raises(FileNotFoundError):
        persist(Away(FileNotFoundError()), 3, said.append)
    assert [pause_s(tries) for tries in (1, 2, 3, 4, 50)] == [5, 30, 180, 300, 300]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder link"])
def test_no_log_is_written_or_removed_through_what_somebody_has_put_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    (run_dir / "logs").mkdir(parents=True)
    outside.mkdir()
    (outside / "kept.log").write_text("kept")
    path = run_dir / "logs" / logs.file_name()
    if kind == "link":
        path.symlink_to(outside / "kept.log")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        (run_dir / "logs").rmdir()
        (run_dir / "logs").symlink_to(outside)
        monkeypatch.setattr(logs, "_MAX_FILES", 0)
    logs.set_up("info", to_stderr=False)
    logs.prune(run_dir)
    if kind != "folder link":
        logs.log_of(run_dir).info("unit")
        assert "cannot write the log" in capsys.readouterr().err
    assert (outside / "kept.log").read_text() == "kept"
