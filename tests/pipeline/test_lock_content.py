"""A lock file that is no lock: `run`, `status` and `clean` say in one line how to remove it, and touch nothing."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.state.lock import LOCK_FILE, RunLock, describe_holder
from pipeline.state.lock_content import Holder, read_holder
from stages.contracts.errors import InputError

GOOD = {"host": "elsewhere", "pid": 7, "since": "2026-01-02 03:04:05 UTC", "token": "0f"}


def holds(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def says(**changes: object) -> Callable[[Path], object]:
    return holds(json.dumps({**GOOD, **changes}).encode())


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": holds(b""),
    "binary": holds(bytes(range(256))),
    "cut": holds(json.dumps(GOOD).encode()[:-9]),
    "a list": holds(b"[]"),
    "a number": holds(b"3"),
    "deep": holds(b"[" * 60_000),
    "huge": holds(b" " * 70_000 + json.dumps(GOOD).encode()),
    "a key too few": holds(b'{"host": "h", "pid": 7, "since": "s"}'),
    "a process that is a text": says(pid="7"),
    "a process that is a group": says(pid=-7),
    "a process that cannot be": says(pid=2**70),
    "a host that is a list": says(host=["h"]),
    "a token that is a path": says(token="../../x"),
    "a token of two lines": says(token="0f\n"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link that leads nowhere": lambda path: path.symlink_to("gone"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_lock_is_one_line_with_the_command_that_removes_it(tmp_path: Path, case: str) -> None:
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    DAMAGED[case](run_dir / LOCK_FILE)
    with pytest.raises(InputError) as refused:
        RunLock(run_dir).__enter__()
    message = str(refused.value)
    assert message.startswith(f"the lock {run_dir / LOCK_FILE} is damaged: ")
    assert message.endswith(f"; if no driver works on this run directory: rm -r '{run_dir / LOCK_FILE}'")
    assert "\n" not in message
    assert describe_holder(run_dir) == f"{run_dir}: {message}"
    assert os.listdir(run_dir) == [LOCK_FILE]


def test_a_lock_that_is_whole_names_its_holder(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(json.dumps(GOOD))
    assert read_holder(tmp_path / LOCK_FILE) == Holder("elsewhere", 7, "2026-01-02 03:04:05 UTC", "0f")
    assert describe_holder(tmp_path) == f"{tmp_path}: driver on host elsewhere, pid 7, since 2026-01-02 03:04:05 UTC"
    assert read_holder(tmp_path / "none") is None


def test_a_lock_that_is_damaged_while_it_is_held_stays_for_the_next_to_explain(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / LOCK_FILE).write_bytes(b"\xff")
    assert (tmp_path / LOCK_FILE).read_bytes() == b"\xff"


def test_a_lock_of_the_future_does_not_lock_for_ever(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps(GOOD))
    os.utime(path, (time.time() + 3600.5, time.time() + 3600.5))
    assert describe_holder(tmp_path).endswith("; its last sign of life is 3600 s ahead, and the next run takes over")
    with RunLock(tmp_path) as held:
        assert held.took_over == "host elsewhere, pid 7, since 2026-01-02 03:04:05 UTC"
    assert os.listdir(tmp_path) == []
