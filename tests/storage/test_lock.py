"""The lock of a run directory on object storage."""

import json
import os
import socket
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from s3fs import S3File
from s3fs.errors import translate_boto_error

from pipeline.state import lock
from pipeline.state.liveness import describe_process
from pipeline.state.lock import LOCK_FILE, RunLock
from pipeline.state.lock_content import Holder
from pipeline.state.lock_files import ObjectLockFile
from stages.contracts.errors import InputError
from stages.io.storage import as_path, create_exclusively


@pytest.fixture
def run_dir(s3: str) -> Path:
    return as_path(f"{s3}/locks/{uuid.uuid4().hex[:8]}")


def _left_by(run_dir: Path, host: str, pid: int) -> None:
    content = {**describe_process(), "host": host, "pid": pid, "since": "yesterday", "token": "theirs"}
    (run_dir / LOCK_FILE).write_text(json.dumps(content))


def test_a_second_driver_is_refused_by_name(run_dir: Path) -> None:
    with RunLock(run_dir):
        with pytest.raises(InputError, match=rf"in use by another driver: host {socket.gethostname()}, pid {os.getpid()}"):
            RunLock(run_dir).__enter__()
        assert (run_dir / LOCK_FILE).exists()
    assert list(run_dir.glob("*")) == [], "nothing of either is left"


def test_one_of_many_takes_a_stale_lock_over(run_dir: Path) -> None:
    """All see the same stale lock at once; those that are not first are refused by the name of the one that is."""
    _left_by(run_dir, socket.gethostname(), 2**22 + 1)  # no process has this number
    locks = [RunLock(run_dir) for _ in range(6)]

    def enter(one: RunLock) -> str | None:
        try:
            return one.__enter__().took_over
        except InputError as e:
            assert f"pid {os.getpid()}" in str(e)
            return None

    with ThreadPoolExecutor(len(locks)) as pool:
        took = list(pool.map(enter, locks))
    (winner,) = [number for number, one in enumerate(took) if one is not None]
    assert took[winner] == f"host {socket.gethostname()}, pid {2**22 + 1}, since yesterday"
    locks[winner].__exit__()
    assert list(run_dir.glob("*")) == []


def test_a_lock_of_another_host_is_stale_when_it_is_not_refreshed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _left_by(run_dir, "elsewhere", 1)
    with pytest.raises(InputError, match="host elsewhere, pid 1"):
        RunLock(run_dir).__enter__()
    monkeypatch.setattr(lock, "STALE_S", 0.0)
    with RunLock(run_dir) as held:
        assert held.took_over == "host elsewhere, pid 1, since yesterday"


def test_a_driver_that_died_while_it_took_over_is_in_nobodys_way(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _left_by(run_dir, socket.gethostname(), 2**22 + 1)
    (run_dir / f".{LOCK_FILE}-taking-theirs").write_bytes(b"")
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    with RunLock(run_dir) as held:
        assert held.took_over is not None


def test_a_heartbeat_does_not_bring_back_a_lock_that_was_taken_over(run_dir: Path) -> None:
    mine = ObjectLockFile(run_dir / LOCK_FILE, "mine")
    assert mine.create(Holder("here", 1, "today", "mine"))
    for beats in (1, 2):
        mine.refresh()
        assert mine.read() == Holder("here", 1, "today", "mine", beats)
    _left_by(run_dir, "elsewhere", 1)
    mine.refresh()
    found = mine.read()
    assert found is not None and found.token == "theirs"


@pytest.mark.parametrize("num_conflicts", [2, 9])
def test_writes_of_one_name_at_the_same_moment_are_tried_again(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, num_conflicts: int
) -> None:
    """What S3 answers then; moto never does."""
    answer = ClientError({"Error": {"Code": "ConditionalRequestConflict", "Message": "try again"}}, "PutObject")
    tried = []
    call = S3File._call_s3

    def conflicting(self: S3File, method: str, *args: Any, **kwargs: Any) -> Any:
        tried.append(method)
        if len(tried) <= num_conflicts:
            raise translate_boto_error(answer)
        return call(self, method, *args, **kwargs)

    monkeypatch.setattr(S3File, "_call_s3", conflicting)
    monkeypatch.setattr("stages.io.storage._CONFLICT_WAITS_S", (0.0, 0.0, 0.0))
    if num_conflicts == 9:
        with pytest.raises(OSError, match="try again"):
            create_exclusively(run_dir / "name", b"ours")
        assert len(tried) == 4
    else:
        assert create_exclusively(run_dir / "name", b"ours")
        assert tried == ["put_object"] * 3
        assert (run_dir / "name").read_bytes() == b"ours"
        assert not create_exclusively(run_dir / "name", b"theirs")
