"""Runs units on a Ray cluster: CPU units as tasks, others on actors that keep a loaded layer shard between units.

The queue stays in the driver: actors and tasks are never restarted by Ray (`max_restarts=0`, `max_retries=0`); a death is an
outcome, and the scheduler gives the unit to another worker.
"""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.config import Resources
from pipeline.executors.base import Slot
from pipeline.units import Failure, Outcome, Unit
from pipeline.worker import Worker
from stages.common.errors import InputError

_OBJECT_STORE_BYTES = 100_000_000  # units pass file names, not data


def connect(address: str) -> str:
    """Connect to a cluster, or start one on this machine. Returns a line that says which.

    address: "local" starts one; "auto" takes the one that RAY_ADDRESS or this machine names, else starts one; anything else
    is an address. Raises InputError when there is none at that address.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "auto":
        with contextlib.suppress(ConnectionError):
            ray.init(address="auto", **options)
            return f"connected to the Ray cluster at {ray.get_runtime_context().gcs_address}"
        address = "local"
    if address == "local":
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, _temp_dir=None, **options)
        return "started a Ray cluster on this machine for this run"
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise InputError(f"--address {address}: no Ray cluster answers there ({e}); start one, or use --address local") from e
    return f"connected to the Ray cluster at {address}"


@dataclass
class _Actor:
    handle: Any
    slot: Slot
    is_ready: bool = False


class RayExecutor:
    """Slots on the cluster that `connect` has connected to.

    A unit without a hold goes to a CPU task, or to an idle worker where workers hold all CPUs.
    """

    def __init__(self, run_dir: Path, resources: Resources) -> None:
        self._run_dir, self._resources = run_dir, resources
        total = ray.cluster_resources()
        self._num_gpus = resources.num_gpus if resources.num_gpus is not None else min(1.0, total.get("GPU", 0.0))
        self._worker_class = ray.remote(num_cpus=resources.num_cpus, num_gpus=self._num_gpus, max_restarts=0)(Worker)
        self._task = ray.remote(num_cpus=1, max_retries=0)(_run_task)
        self._actors: dict[str, _Actor] = {}
        self._running: dict[Any, tuple[Slot, Unit | None]] = {}
        self._numbers = itertools.count()
        self._wanted_workers = 0

    @property
    def num_workers(self) -> int:
        """The setting, else what the cluster has room for now."""
        return self._resources.num_workers or max(1, self._room_for_workers())

    def _room_for_workers(self) -> int:
        total = ray.cluster_resources()
        by_cpu = int(total.get("CPU", 0) // self._resources.num_cpus)
        return min(by_cpu, int(total.get("GPU", 0) // self._num_gpus)) if self._num_gpus else by_cpu

    @property
    def num_running(self) -> int:
        """Units in flight."""
        return sum(1 for _, unit in self._running.values() if unit is not None)

    def begin(self, units: Sequence[Unit]) -> None:
        """Want as many workers as the stage can keep busy. Without GPUs a worker serves CPU units as well as a task."""
        held = {unit.hold.key for unit in units if unit.hold}
        alone = sum(1 for unit in units if unit.hold is None and (unit.on_worker or not self._num_gpus))
        self._wanted_workers = max(len(held) + alone, 1 if self._actors else 0)

    def _start_workers(self) -> None:
        """Start workers up to what is wanted and what the cluster has room for; nodes that join are used at once."""
        wanted = min(self._wanted_workers, self.num_workers)
        while len(self._actors) < wanted:
            slot = Slot(f"worker-{next(self._numbers)}", is_worker=True)
            handle: Any = self._worker_class.options(scheduling_strategy="SPREAD").remote(self._run_dir)
            self._actors[slot.id] = _Actor(handle, slot)
            self._running[handle.__ray_ready__.remote()] = (slot, None)

    def free_slots(self) -> list[Slot]:
        """Workers that are up and idle, then room for CPU tasks beside the workers."""
        self._start_workers()
        busy = {slot.id for slot, unit in self._running.values() if unit is not None}
        slots = [actor.slot for actor in self._actors.values() if actor.is_ready and actor.slot.id not in busy]
        cpus_of_workers = len(self._actors) * self._resources.num_cpus
        room = int(ray.cluster_resources().get("CPU", 0)) - cpus_of_workers
        num_tasks = sum(1 for slot, unit in self._running.values() if unit is not None and not slot.is_worker)
        return slots + [Slot(f"task-{next(self._numbers)}", is_worker=False) for _ in range(room - num_tasks)]

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Send the unit to its worker, or start a task named after it."""
        name = f"{unit.stage} {unit.label}"
        if slot.is_worker:
            ref = self._actors[slot.id].handle.run.options(name=name).remote(unit)
        else:
            ref = self._task.options(name=name).remote(self._run_dir, unit)
        self._running[ref] = (slot, unit)

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """Outcomes of what has ended, deaths included."""
        if not self._running:
            return []
        refs = list(self._running)
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        ended = []
        for ref in ready:
            slot, unit = self._running.pop(ref)
            try:
                value = ray.get(ref)
            except RayTaskError as e:
                value = Outcome("", 0.0, {}, Failure("error", str(e.cause or e), str(e)))
            except RayError as e:
                value = Outcome("", 0.0, {}, Failure("lost", _first_line(e)))
                self._forget(slot)
            if unit is None:
                if slot.id in self._actors:
                    self._actors[slot.id].is_ready = True
            else:
                ended.append((slot, unit, value))
        return ended

    def _forget(self, slot: Slot) -> None:
        actor = self._actors.pop(slot.id, None)
        if actor is not None:
            ray.kill(actor.handle, no_restart=True)

    def why_idle(self) -> str:
        """What a worker needs and what the cluster has."""
        total = ray.cluster_resources()
        return (
            f"waiting for a worker: each needs {self._resources.num_cpus} CPUs and {self._num_gpus:g} GPUs; the cluster has "
            f"{total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs in all: add a node or lower resources"
        )

    def close(self) -> None:
        """End the workers; a cluster that `connect` started ends with it."""
        for actor in list(self._actors.values()):
            self._forget(actor.slot)


def _run_task(run_dir: Path, unit: Unit) -> Outcome:
    return Worker(run_dir).run(unit)


def _first_line(error: RayError) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'the worker is gone'}"
