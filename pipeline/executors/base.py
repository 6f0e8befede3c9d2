"""What the scheduler needs of an executor."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.driver.outcome import Outcome
from stages.contracts.units import Hold, Unit


@dataclass(frozen=True)
class Slot:
    """Room for one unit: a worker (which can hold a layer shard, on its GPU), or a CPU task.

    is_queued: a unit put here waits behind others, so that a CPU has its next one at hand: only for units that take no time.
    """

    id: str
    is_worker: bool
    is_queued: bool = False


class Executor(Protocol):
    """Runs units in slots. Only the driver calls it, from one thread."""

    @property
    def num_workers(self) -> int:
        """Workers there will be; decides how finely a model is cut to layer shards."""

    @property
    def num_running(self) -> int:
        """Units submitted and not yet returned by `wait`."""

    def want(self, units: Sequence[Unit]) -> None:
        """These units are to be run: make the slots they need."""

    def free_slots(self) -> Iterable[Slot]:
        """Slots that can take a unit now: workers, then CPU tasks, then CPU tasks that are to wait for a CPU."""

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Start a unit in a free slot."""

    def open_ahead(self, slot: Slot, hold: Hold, is_free: bool) -> None:
        """A worker will need this hold next: to be read in the meantime, and opened if it is free, done with what it has. A
        hint, which may come to nothing."""

    def is_opening(self, slot: Slot) -> bool:
        """Whether a slot's worker is still opening the hold of the unit that it was given."""

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """Units that have ended since the last call; waits up to timeout_s for the first."""

    def cancel(self, slot: Slot, reason: str) -> None:
        """End what runs in a slot; its unit is then returned by `wait` as lost, with this reason."""

    def make_room(self) -> None:
        """Free the memory of all workers; nothing runs."""

    def why_idle(self) -> str:
        """What is missing while units are ready and none runs."""

    def describe(self) -> str:
        """One line: what workers there will be, and why."""

    def close(self) -> None:
        """End all workers."""

    def disconnect(self) -> None:
        """Leave the cluster, and end it if it was started for this run."""
