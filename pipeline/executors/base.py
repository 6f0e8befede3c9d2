"""Interface between the driver and an executor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.driver.outcome import Outcome
from stages.contracts.units import Hold, Unit


@dataclass(frozen=True)
class Slot:
    """Room for one unit: a worker (which can hold a layer shard, on its GPU), or a CPU task.

    is_queued: a unit put here waits for a CPU behind other units, so that the CPU never waits for the driver. Meant for very
    short units only.
    """

    id: str
    is_worker: bool
    is_queued: bool = False


class Executor(Protocol):
    """Runs units in slots. Only the driver calls it, from one thread."""

    @property
    def num_workers(self) -> int:
        """Number of workers that the run will have. It decides into how many layer shards a model is cut."""

    @property
    def num_running(self) -> int:
        """Number of units that were submitted and not yet returned by `wait`."""

    def want(self, units: Sequence[Unit]) -> None:
        """Announce unfinished units, so that the executor starts the workers that they need."""

    def free_slots(self) -> Iterable[Slot]:
        """Slots that can take a unit now: workers, then CPU tasks, then CPU tasks that queue for a CPU."""

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Start a unit in a free slot."""

    def open_ahead(self, slot: Slot, hold: Hold, is_free: bool) -> None:
        """Tell a worker which hold it needs next. A free worker (is_free) opens it; a busy one only reads its files in the
        background. This is a hint: an executor may ignore it."""

    def is_opening(self, slot: Slot) -> bool:
        """Whether the worker of a slot is still opening the hold of its current unit."""

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """Units that have ended since the last call, with their outcomes. Waits up to timeout_s for the first."""

    def cancel(self, slot: Slot, reason: str) -> None:
        """Cancel the unit in a slot. `wait` then returns it as lost, with this reason."""

    def make_room(self) -> None:
        """Free the memory of all workers. Called only while no unit runs."""

    def why_idle(self) -> str:
        """Message on missing resources, for the case that units are ready and none runs."""

    def describe(self) -> str:
        """One line that says how many workers there will be, and why."""

    def close(self) -> None:
        """End all workers."""

    def disconnect(self) -> None:
        """Leave the cluster. A cluster that was started for this run ends."""
