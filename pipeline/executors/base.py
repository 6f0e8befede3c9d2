"""What the scheduler needs of an executor."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.units import Outcome, Unit


@dataclass(frozen=True)
class Slot:
    """Room for one unit: a worker (which can hold a layer shard, on its GPU), or a CPU task."""

    id: str
    is_worker: bool


class Executor(Protocol):
    """Runs units in slots. Only the driver calls it, from one thread."""

    @property
    def num_workers(self) -> int:
        """Workers there will be; decides how finely a model is cut to layer shards."""

    @property
    def num_running(self) -> int:
        """Units submitted and not yet returned by `wait`."""

    def begin(self, units: Sequence[Unit]) -> None:
        """A stage with these units begins: make the slots it needs."""

    def free_slots(self) -> list[Slot]:
        """Slots that can take a unit now."""

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Start a unit in a free slot."""

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """Units that have ended since the last call; waits up to timeout_s for the first."""

    def why_idle(self) -> str:
        """What is missing while units are ready and none runs."""

    def close(self) -> None:
        """End all processes that this executor started."""
