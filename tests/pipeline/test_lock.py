"""Who holds a run directory, who has lost it, and who can be seen to be gone. (Its like on object storage: tests/storage.)"""

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import LockLost
from pipeline.state import lock
from pipeline.state.liveness import describe_process, is_gone
from pipeline.state.lock import LOCK_FILE, RunLock
from pipeline.state.lock_content import Holder, read_holder
from pipeline.state.lock_files import LocalLockFile
from stages.contracts.errors import InputError

REPOSITORY = Path(__file__).parents[2]
DEAD_PID = 2**22 + 1  # no process has this number


def left_by(run_dir: Path, age_s: float = 0, **changes: object) -> None:
    """A lock whose holder is not refreshing it."""
    found = {**describe_process(), "since": "yesterday", "token": "theirs", **changes}
    (run_dir / LOCK_FILE).write_text(Holder(**found).to_json())
    os.utime(run_dir / LOCK_FILE, (time.time() - age_s,) * 2)


def token_in(run_dir: Path) -> str:
    holder = read_holder(run_dir / LOCK_FILE)
    assert holder is not None
    return holder.token


def test_a_process_is_gone_when_its_number_is_free_or_another_process_has_it() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        started = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        alive = {**describe_process(), "pid": process.pid, "started": started}
        assert not is_gone(alive)
        assert is_gone({**alive, "started": started + 1})
        assert not is_gone({**alive, "started": None}), "not known: nothing is concluded"
    finally:
        process.kill()
        process.wait(30)
    assert is_gone(alive)


@pytest.mark.parametrize("changed", [{"host": "elsewhere"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}], ids=str)
def test_a_process_of_another_place_cannot_be_seen_whatever_its_number(changed: dict[str, str]) -> None:
    dead = {**describe_process(), "pid": DEAD_PID}
    assert is_gone(dead)
    assert not is_gone({**dead, **changed})


def test_a_container_with_the_same_host_name_does_not_take_a_living_drivers_lock(tmp_path: Path) -> None:
    """In a process namespace of its own, this process's number is nobody's."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0 or shutil.which("unshare") is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("a process namespace needs root and the command unshare")
    enter = f"from pathlib import Path; from pipeline.state.lock import RunLock; RunLock(Path({str(tmp_path)!r})).__enter__()"
    with RunLock(tmp_path) as held:
        done = subprocess.run(
            [*unshare, sys.executable, "-c", enter], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
        )
        held.check()
    assert f"is in use by another driver: host {socket.gethostname()}, pid {os.getpid()}" in done.stderr


def test_the_lock_of_a_process_whose_number_is_used_again_is_taken_over(tmp_path: Path) -> None:
    left_by(tmp_path, started=1)
    with RunLock(tmp_path) as held:
        assert held.took_over == f"host {socket.gethostname()}, pid {os.getpid()}, since yesterday"


def test_one_of_many_takes_a_stale_lock_over(tmp_path: Path) -> None:
    """All find the same stale lock; those that are not first are refused by the name of the one that is."""
    left_by(tmp_path, pid=DEAD_PID)
    locks = [RunLock(tmp_path) for _ in range(6)]

    def enter(one: RunLock) -> RunLock | None:
        try:
            return one.__enter__()
        except InputError as e:
            assert f"pid {os.getpid()}" in str(e)
            return None

    with ThreadPoolExecutor(len(locks)) as pool:
        (winner,) = [one for one in pool.map(enter, locks) if one is not None]
    winner.check()
    winner.__exit__()
    assert os.listdir(tmp_path) == []


def test_who_comes_too_late_to_take_a_lock_over_does_not_touch_the_new_holders(tmp_path: Path) -> None:
    """Neither removes it nor moves it aside for a moment, in which a third driver could make one."""
    left_by(tmp_path, pid=DEAD_PID)
    late = LocalLockFile(tmp_path / LOCK_FILE, "late")
    with RunLock(tmp_path) as held:
        before = (tmp_path / LOCK_FILE).stat()
        assert not late.take_away("theirs", 60)
        after = (tmp_path / LOCK_FILE).stat()
        assert (before.st_ino, before.st_ctime_ns) == (after.st_ino, after.st_ctime_ns), "never renamed"
        held.check()


def test_a_driver_that_died_while_it_took_over_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(tmp_path, pid=DEAD_PID)
    taking = tmp_path / f".{LOCK_FILE}-taking-theirs"
    taking.touch()
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    with RunLock(tmp_path) as held:
        assert held.took_over is not None
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("age_s", [3600, -3600], ids=["long ago", "in the future"])
def test_a_lock_whose_time_is_far_from_now_is_taken_over(tmp_path: Path, age_s: float) -> None:
    left_by(tmp_path, age_s, host="elsewhere")
    with RunLock(tmp_path) as held:
        assert held.took_over == f"host elsewhere, pid {os.getpid()}, since yesterday"


def test_who_has_lost_the_lock_is_told_by_whom_and_leaves_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 3600.0)  # as if it slept
    mine = RunLock(tmp_path).__enter__()
    mine.check()
    left_by(tmp_path, 30, host="elsewhere", pid=7)
    before = (tmp_path / LOCK_FILE).stat().st_mtime
    for _ in range(2):
        with pytest.raises(LockLost) as lost:
            mine.check()
        assert str(lost.value) == (
            f"lost the lock of {tmp_path} to host elsewhere, pid 7, since yesterday; nothing more is written; run the same "
            "command again when no other driver runs here"
        )
    mine.__exit__()
    assert token_in(tmp_path) == "theirs"
    assert (tmp_path / LOCK_FILE).stat().st_mtime == before


def test_a_heartbeat_does_not_refresh_the_lock_of_a_successor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    mine = RunLock(tmp_path).__enter__()
    left_by(tmp_path, 30, host="elsewhere")
    mine._thread.join(20)
    assert not mine._thread.is_alive(), "it has found that the lock is lost"
    assert time.time() - (tmp_path / LOCK_FILE).stat().st_mtime > 25
    with pytest.raises(LockLost, match="to host elsewhere"):
        mine.check()
    mine.__exit__()
    assert token_in(tmp_path) == "theirs"


def test_a_lock_that_is_gone_is_lost_and_one_that_is_damaged_too(tmp_path: Path) -> None:
    for damage, why in ((Path.unlink, "its file is gone"), (lambda path: path.write_text("?"), "is damaged")):
        mine = RunLock(tmp_path).__enter__()
        damage(tmp_path / LOCK_FILE)
        with pytest.raises(LockLost, match=why):
            mine.check()
        mine.__exit__()
    (tmp_path / LOCK_FILE).unlink()


def test_who_slept_while_nobody_came_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 3600.0)
    monkeypatch.setattr(lock, "STALE_S", 0.1)
    with RunLock(tmp_path) as mine:
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        time.sleep(0.2)
        mine.check()
        assert time.time() - (tmp_path / LOCK_FILE).stat().st_mtime < 30, "refreshed before anything is done"


class Failing:
    """Instead of `LocalLockFile.refresh`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.error, self.called = error, threading.Event()
        monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
        monkeypatch.setattr(LocalLockFile, "refresh", lambda file: self())

    def __call__(self) -> None:
        self.called.set()
        raise self.error


def lost(one: RunLock, within_s: float = 20) -> str:
    """What is said when the lock is lost."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            one.check()
        except LockLost as e:
            return str(e)
        time.sleep(0.01)
    raise AssertionError("the lock was not lost")


def test_a_heartbeat_that_fails_for_longer_than_a_lock_lives_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    with RunLock(tmp_path) as mine:
        failing = Failing(monkeypatch, OSError(errno.ESTALE, "Stale file handle"))
        mine._thread = threading.Thread(target=mine._beat, daemon=True)
        mine._thread.start()
        assert failing.called.wait(20)
        mine.check()  # it may pass
        message = lost(mine)
    assert message == (
        f"lost the lock of {tmp_path}: it could not be refreshed for 1 s (OSError: [Errno 116] Stale file handle); "
        "nothing more is written; run the same command again when no other driver runs here"
    )


def test_a_heartbeat_that_may_not_refresh_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with RunLock(tmp_path) as mine:
        assert "it cannot be refreshed (PermissionError: [Errno 13] Permission denied)" in lost(mine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_heartbeat_that_breaks_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Failing(monkeypatch, TypeError("ours"))
    with RunLock(tmp_path) as mine:
        assert "its heartbeat has ended with the error above" in lost(mine)
