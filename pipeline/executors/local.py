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
        """Number of units that have run but were not yet returned by `wait`."""
        return len(self._ended)

    def want(self, units: Sequence[Unit]) -> None:
        """Nothing to do: this process is the only worker."""

    def free_slots(self) -> list[Slot]:
        """This process, unless the outcome of its last unit is still to be returned by `wait`."""
        return [] if self._ended else [_SLOT]

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Run the unit before returning."""
        self._ended.append((slot, unit, self._worker.run(unit)))

    def open_ahead(self, slot: Slot, hold: Hold, is_free: bool) -> None:
        """Ignored: reading in the background would slow the unit that runs here."""

    def is_opening(self, slot: Slot) -> bool:
        """Always false: `submit` returns only after the unit has ended."""
        return False

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """The unit that has just run, with its outcome. Without one, sleeps for timeout_s."""
        if not self._ended:
            time.sleep(timeout_s)
        ended, self._ended = self._ended, []
        return ended

    def cancel(self, slot: Slot, reason: str) -> None:
        """Never called: a unit has ended before the driver can cancel it."""

    def make_room(self) -> None:
        """Free the layer shard that the worker holds."""
        self._worker.close()

    def why_idle(self) -> str:
        """Message for the only possible cause: units that depend on each other in a cycle."""
        return "no unit can run: their dependencies form a cycle"

    def describe(self) -> str:
        """One line that names the one worker."""
        return "every unit runs in this process"

    def close(self) -> None:
        """Free the layer shard that the worker holds: this process may live on."""
        self._worker.close()

    def disconnect(self) -> None:
        """Nothing to disconnect from."""
