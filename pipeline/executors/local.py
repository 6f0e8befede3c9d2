"""Runs every unit in this process, one after another: for debugging, for tests, for one small machine."""

import time
from collections.abc import Sequence

from pipeline.driver.outcome import Outcome
from pipeline.driver.worker import Worker
from pipeline.executors.base import Slot
from stages.contracts.units import Hold, Unit

_SLOT = Slot("local", is_worker=True)


class LocalExecutor:
    """One worker, this process."""

    num_workers = 1

    def __init__(self) -> None:
        self._worker = Worker()
        self._ended: list[tuple[Slot, Unit, Outcome]] = []

    @property
    def num_running(self) -> int:
        """Units run but not yet returned by `wait`."""
        return len(self._ended)

    def want(self, units: Sequence[Unit]) -> None:
        """Nothing to make."""

    def free_slots(self) -> list[Slot]:
        """This process, when it has nothing to hand over."""
        return [] if self._ended else [_SLOT]

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Run the unit now."""
        self._ended.append((slot, unit, self._worker.run(unit)))

    def open_ahead(self, slot: Slot, hold: Hold, is_free: bool) -> None:
        """Not done: it would compete with what runs here."""

    def is_opening(self, slot: Slot) -> bool:
        """Never seen: see `cancel`."""
        return False

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """The unit that has just run; without one there is nothing to do but wait."""
        if not self._ended:
            time.sleep(timeout_s)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, slot: Slot, reason: str) -> None:
        """Never called: a unit has ended by the time the driver looks."""

    def make_room(self) -> None:
        """Free the layer shard that the worker holds."""
        self._worker.close()

    def why_idle(self) -> str:
        """Only a cycle of units could leave this executor idle."""
        return "no unit can run: their dependencies form a cycle"

    def describe(self) -> str:
        """That there is one worker."""
        return "every unit runs in this process"

    def close(self) -> None:
        """Nothing was started."""

    def disconnect(self) -> None:
        """Nothing was connected to."""
