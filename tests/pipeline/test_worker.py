"""What a worker holds, and when it is opened."""

import contextlib
import errno
import gc
import os
import re
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.driver.outcome import Failure
from pipeline.driver.worker import Worker
from pipeline.executors.local import LocalExecutor
from stages.contracts.errors import InputError
from stages.contracts.stream_units import LayerShardArgs
from stages.contracts.units import Call, Hold, Job, NoFacts, UnitResult
from stages.io.files import DigestingFile
from tests.pipeline.fake import ToyArgs, at, unit

REPOSITORY = Path(__file__).parents[2]
OPENED: list[str] = []


@dataclass(frozen=True)
class Counted:
    """A hold that says what it has read."""

    key: str
    bytes_read: int = 1000

    def read_ahead(self, args: object) -> None:
        pass

    def close(self) -> None:
        pass


def open_counted(key: str) -> Counted:
    OPENED.append(key)
    return Counted(key)


def open_broken(key: str) -> Counted:
    raise RuntimeError(f"{key} is broken")


def held(key: str, call: str = "open_counted") -> Hold:
    return Hold(key, Call(f"tests.pipeline.test_worker:{call}", key), "/toy", key)


def test_what_is_opened_ahead_is_there_for_the_first_unit_and_its_bytes_are_counted_once(tmp_path: Path) -> None:
    OPENED.clear()
    worker, hold = Worker(), held("a")
    worker.open_ahead(hold)
    assert OPENED == ["a"]
    units = at(tmp_path, [unit("one"), unit("two")])
    outcomes = [worker.run(replace(one, hold=hold)) for one in units]
    assert [outcome.facts for outcome in outcomes] == [{"held": "a"}] * 2
    assert [outcome.bytes_read for outcome in outcomes] == [1000, 0]
    assert OPENED == ["a"]


def test_an_error_while_opening_ahead_comes_again_with_the_unit(tmp_path: Path) -> None:
    worker, hold = Worker(), held("a", "open_broken")
    with pytest.raises(RuntimeError, match="a is broken"):
        worker.open_ahead(hold)
    (one,) = at(tmp_path, [unit("one")])
    failure = worker.run(replace(one, hold=hold)).failure
    assert failure is not None
    assert failure.message == "RuntimeError: a is broken"


class Reader:
    """A hold that keeps what it is told to read ahead."""

    bytes_read = 0

    def __init__(self) -> None:
        self.asked: list[object] = []

    def read_ahead(self, args: object) -> None:
        self.asked.append(args)

    def close(self) -> None:
        pass


READERS: list[Reader] = []


def open_reader(args: LayerShardArgs) -> Reader:
    READERS.append(Reader())
    return READERS[-1]


def test_what_is_held_reads_the_next_layer_shard_ahead() -> None:
    READERS.clear()
    worker = Worker()
    layers = [LayerShardArgs("m", first, first + 2, 1) for first in (0, 2)]
    now, then = (Hold(f"{one.first}", Call("tests.pipeline.test_worker:open_reader", one), "/toy", "") for one in layers)
    worker.read_ahead(then)  # nothing is held yet
    worker.open_ahead(now)
    worker.read_ahead(then)
    assert [reader.asked for reader in READERS] == [[layers[1]]]


class Cyclic:
    """A hold that refers to itself, as models do; closed, it no longer does."""

    bytes_read = 0

    def __init__(self) -> None:
        self.itself: Cyclic | None = self

    def read_ahead(self, args: object) -> None:
        pass

    def close(self) -> None:
        self.itself = None


CYCLIC: list[weakref.ref[Cyclic]] = []


def open_cyclic(key: str) -> Cyclic:
    assert all(earlier() is None for earlier in CYCLIC), "two layer shards may not fit into memory"
    made = Cyclic()
    CYCLIC.append(weakref.ref(made))
    if key == "broken":
        raise RuntimeError(f"{key} is broken")
    return made


@pytest.mark.parametrize("is_first_broken", [False, True])
def test_what_was_held_is_gone_before_the_next_is_opened(is_first_broken: bool) -> None:
    CYCLIC.clear()
    worker = Worker()
    gc.disable()  # so that only the worker itself can free it in time
    try:
        first = held("broken" if is_first_broken else "a", "open_cyclic")
        with pytest.raises(RuntimeError) if is_first_broken else contextlib.nullcontext():
            worker.open_ahead(first)
        worker.open_ahead(held("b", "open_cyclic"))
    finally:
        gc.enable()
    assert len(CYCLIC) == 2


def test_room_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    CYCLIC.clear()
    worker = Worker()
    monkeypatch.setattr("pipeline.executors.local.Worker", lambda: worker)
    executor = LocalExecutor()
    gc.disable()
    try:
        worker.open_ahead(held("a", "open_cyclic"))
        executor.make_room()
        (made,) = CYCLIC
        assert made() is None
    finally:
        gc.enable()


def raising(job: Job[ToyArgs]) -> UnitResult[NoFacts]:
    """Raise what a test has put here."""
    raise ERRORS[job.args.name]


STALE = OSError(errno.ESTALE, "Stale file handle", "/run/hidden")
ERRORS: dict[str, Exception] = {
    "stale": STALE,
    "full": OSError(errno.ENOSPC, "No space left on device", "/run/out"),
    "denied": PermissionError(errno.EACCES, "Permission denied", "/run/out"),
    "ours": FileNotFoundError(errno.ENOENT, "No such file or directory", "/run/hidden"),
    "bad": InputError("num_sequences is 9; use 8"),
}


def failure_of(tmp_path: Path, name: str, worker: Worker | None = None) -> Failure:
    one = unit(name, call="tests.pipeline.test_worker:raising")
    failure = (worker or Worker()).run(*at(tmp_path, [one])).failure
    assert failure is not None
    return failure


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stale", Failure("passing", "OSError: [Errno 116] Stale file handle: '/run/hidden'")),
        ("full", Failure("outside", "[Errno 28] No space left on device: '/run/out'; free space there")),
        (
            "denied",
            Failure("outside", "[Errno 13] Permission denied: '/run/out'; let the user of the workers read and write there"),
        ),
        ("bad", Failure("input", "num_sequences is 9; use 8")),
    ],
)
def test_an_error_of_the_machine_or_the_user_is_one_line(tmp_path: Path, name: str, expected: Failure) -> None:
    assert failure_of(tmp_path, name) == expected


def test_an_os_error_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    failure = failure_of(tmp_path, "ours")
    assert failure.kind == "error"
    assert "test_worker.py" in failure.detail and "No such file or directory" in failure.detail


def test_a_full_disk_is_named_with_the_file_that_did_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system does not say which file a write was to."""

    def no_room(self: DigestingFile, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DigestingFile, "write", no_room)
    (one,) = at(tmp_path, [unit("one")])
    failure = Worker().run(one).failure
    assert failure is not None
    path = tmp_path / one.part_dir / "one.txt"
    assert failure.message == f"[Errno 28] No space left on device: '{path}'; free space there"


def test_what_is_held_is_opened_again_after_an_error_that_may_pass(tmp_path: Path) -> None:
    """Files that it keeps open may have gone stale for good."""
    OPENED.clear()
    worker, hold = Worker(), held("a")
    (one, stale) = at(tmp_path, [unit("one"), unit("stale", call="tests.pipeline.test_worker:raising")])
    worker.run(replace(one, hold=hold))
    worker.run(replace(stale, hold=hold))
    worker.run(replace(one, hold=hold))
    assert OPENED == ["a", "a"]


def open_slowly(key: str) -> Counted:
    time.sleep(0.2)
    return Counted(key)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_opening_is_timed_apart_from_the_unit_and_told_once(tmp_path: Path, is_ahead: bool) -> None:
    worker, hold = Worker(), held("a", "open_slowly")
    began = time.time()
    if is_ahead:
        worker.open_ahead(hold)
    units = at(tmp_path, [unit("one"), unit("two")])
    first = worker.run(replace(units[0], hold=hold))
    assert first.open_s >= 0.2 and first.open_s + first.elapsed_s <= time.time() - began
    second = worker.run(replace(units[1], hold=hold))
    assert second.open_s == 0.0


@dataclass(frozen=True)
class Eaten:
    """Facts of a unit that takes memory."""

    num_tokens: int
    eaten: int


def hungry(job: Job[ToyArgs]) -> UnitResult[Eaten]:
    return UnitResult(Eaten(16_384, len(bytearray(200_000_000))))


def test_each_units_memory_peak_is_its_own() -> None:
    """In a new process: an allocator that has room left, and what other tests used, would hide it."""
    script = """
import sys, tempfile
from pathlib import Path
from pipeline.driver.worker import Worker
from tests.pipeline.fake import ToyArgs, at, unit
hungry, small = at(Path(tempfile.mkdtemp()), [unit("hungry", call="tests.pipeline.test_worker:hungry"), unit("small")])
worker = Worker(has_own_process=sys.argv[1] == "own")
print(*(worker.run(one).peak_bytes for one in (small, hungry, small)))
"""
    for whose, is_reset in (("own", True), ("shared", False)):
        command = [sys.executable, "-c", script, whose]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True)
        before, most, after = map(int, done.stdout.split())
        assert most - before > 150_000_000
        assert (most - after > 150_000_000) == is_reset, "another one's process keeps its peak"


def test_a_worker_logs_what_it_does_and_why_it_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    worker = Worker(has_own_process=True)
    one, stale = at(tmp_path, [unit("one"), unit("stale", call="tests.pipeline.test_worker:raising")])
    hold = replace(held("a"), run_dir=str(tmp_path), label="toy layers 0-1")
    worker.run(replace(one, hold=hold))
    worker.run(stale)
    (path,) = (tmp_path / "logs").iterdir()
    assert path.name == f"{socket.gethostname()}-{os.getpid()}.log"
    text = path.read_text()
    seen = [line.split(" ", 2)[2] for line in text.splitlines() if line[:2] == "20"]
    assert seen[:2] == ["INFO toy one: begins", "INFO toy layers 0-1: loading"]
    assert re.fullmatch(r"INFO toy layers 0-1: loaded in \d\.\d s", seen[2])
    assert re.fullmatch(r"INFO toy one: sealed, \d\.\d s, peak \S+ [MG]B", seen[3])
    assert seen[4:] == ["INFO toy stale: begins", "ERROR toy stale: failed"]
    assert "Traceback" in text and "in raising" in text and "[Errno 116] Stale file handle" in text
    assert capfd.readouterr().err == text, "Ray keeps the same by worker"


def test_a_worker_that_shares_its_process_leaves_standard_error_to_the_driver(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    failure_of(tmp_path, "ours", Worker())
    assert capfd.readouterr().err == ""
    assert "Traceback" in next((tmp_path / "logs").iterdir()).read_text()
