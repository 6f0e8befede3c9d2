"""What a worker holds, and when it is opened."""

import contextlib
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.executors.local import LocalExecutor
from pipeline.units import Hold
from pipeline.worker import Worker
from tests.pipeline.fake import at, unit

OPENED: list[str] = []


class Counted(str):
    """A hold that says what it has read."""

    bytes_read = 1000

    def read_ahead(self, model: str, first: int, stop: int) -> None:
        pass

    def close(self) -> None:
        pass


def open_counted(key: str) -> str:
    OPENED.append(key)
    return Counted(key)


def open_broken(key: str) -> str:
    raise RuntimeError(f"{key} is broken")


def held(key: str, call: str = "open_counted") -> Hold:
    return Hold(key, f"tests.pipeline.test_worker:{call}", {"key": key})


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
        self.asked: list[tuple[str, int, int]] = []

    def read_ahead(self, model: str, first: int, stop: int) -> None:
        self.asked.append((model, first, stop))

    def close(self) -> None:
        pass


READERS: list[Reader] = []


def open_reader(model: str, first: int, stop: int) -> Reader:
    READERS.append(Reader())
    return READERS[-1]


def test_what_is_held_reads_the_next_layer_shard_ahead() -> None:
    READERS.clear()
    worker = Worker()
    call = "tests.pipeline.test_worker:open_reader"
    now, then = (Hold(f"{first}", call, {"model": "m", "first": first, "stop": first + 2}) for first in (0, 2))
    worker.read_ahead(then)  # nothing is held yet
    worker.open_ahead(now)
    worker.read_ahead(then)
    worker.read_ahead(held("a"))
    assert [reader.asked for reader in READERS] == [[("m", 2, 4)]]


class Cyclic:
    """A hold that refers to itself, as models do; closed, it no longer does."""

    bytes_read = 0

    def __init__(self) -> None:
        self.itself: Cyclic | None = self

    def read_ahead(self, model: str, first: int, stop: int) -> None:
        pass

    def close(self) -> None:
        self.itself = None


CYCLIC: list[weakref.ref[Cyclic]] = []


def open_cyclic(key: str, is_broken: bool = False) -> Cyclic:
    assert all(earlier() is None for earlier in CYCLIC), "two layer shards may not fit into memory"
    made = Cyclic()
    CYCLIC.append(weakref.ref(made))
    if is_broken:
        raise RuntimeError(f"{key} is broken")
    return made


@pytest.mark.parametrize("is_first_broken", [False, True])
def test_what_was_held_is_gone_before_the_next_is_opened(is_first_broken: bool) -> None:
    CYCLIC.clear()
    worker = Worker()
    gc.disable()  # so that only the worker itself can let go in time
    try:
        first = held("a", "open_cyclic")
        with pytest.raises(RuntimeError) if is_first_broken else contextlib.nullcontext():
            worker.open_ahead(replace(first, args={**first.args, "is_broken": is_first_broken}))
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
