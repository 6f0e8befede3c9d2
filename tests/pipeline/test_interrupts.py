"""Signals end a run, also where a library drops the exception that a signal raises."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.driver.interrupts import check_signals, handle_signals, watch_signals
from pipeline.driver.loop import Driver
from pipeline.executors.local import LocalExecutor
from stages.contracts.units import Job, NoFacts, UnitResult
from tests.pipeline.fake import ToyArgs, ToyRun, unit

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _handlers_of_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in BOTH}
    yield
    watch_signals()
    for number, handler in before.items():
        signal.signal(number, handler)


def swallow(job: Job[ToyArgs]) -> UnitResult[NoFacts]:
    """As a library does that tries to import another one and catches everything."""
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), int(job.args.name))
    return UnitResult(NoFacts())


@pytest.mark.parametrize("number", BOTH)
def test_a_driver_ends_although_a_unit_has_dropped_the_exception(tmp_path: Path, number: signal.Signals) -> None:
    watch_signals()
    first = unit("first", call=f"{__name__}:swallow", args=ToyArgs(str(int(number))))
    run = ToyRun([first, unit("second", after=(first.id,))], tmp_path)
    with pytest.raises(KeyboardInterrupt, match=number.name):
        Driver([run], LocalExecutor(), print).drive()
    assert list(run.done_units) == ["first"]
    watch_signals()
    check_signals()


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """nohup, and a job that a shell's script starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    check_signals()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a library might
    handle_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
