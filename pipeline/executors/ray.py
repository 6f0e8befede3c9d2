"""Runs units on a Ray cluster: CPU units as tasks, other units on actors that keep a loaded layer shard between units.

The driver keeps the queue. Ray never restarts actors or tasks (`max_restarts=0`, `max_retries=0`): the death of a worker is an
outcome, and the driver gives the unit to another worker.
"""

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayError, RayTaskError

from pipeline.driver.outcome import Failure, Outcome
from pipeline.driver.worker import Worker
from pipeline.errors import RunFailed
from pipeline.executors.base import Slot
from pipeline.executors.metrics import UnitMetrics
from stages.contracts.errors import InputError
from stages.contracts.settings import Resources
from stages.contracts.units import Hold, Unit

_OBJECT_STORE_BYTES = 100_000_000  # small, because units pass file names and no data
_RESOURCES_TTL_S = 2.0
_PROBE_S = 10.0
_MAX_FAILED_STARTS = 3
_TASKS_PER_CPU = 8
_MAX_NAMES = 500


def connect(address: str) -> str:
    """Connect to a cluster, or start one on this machine. Returns a line that says which of the two happened.

    address: "local" starts a cluster; "auto" connects to the one named by RAY_ADDRESS or running on this machine, else starts
    one; any other value is an address. Raises InputError when no cluster answers at that address, or when this process is
    connected already: then only "auto" goes, which keeps that connection.
    """
    if ray.is_initialized():
        if address != "auto":
            raise InputError(f"address {address}: this process is connected to a Ray cluster; use auto, or call ray.shutdown()")
        return f"uses the connection of this process to the Ray cluster at {ray.get_runtime_context().gcs_address}"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "auto":
        with contextlib.suppress(ConnectionError):
            ray.init(address="auto", **options)
            return f"connected to the Ray cluster at {ray.get_runtime_context().gcs_address}"
        address = "local"
    if address == "local":
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **options)
        return "started a Ray cluster on this machine for this run"
    _probe(address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise InputError(f"--address {address}: no Ray cluster answers there ({e}); start one, or use --address local") from e
    return f"connected to the Ray cluster at {address}"


def _probe(address: str) -> None:
    """Raise at once if nothing listens at the address: Ray itself would retry for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"--address {address}: write HOST:PORT of a Ray head, auto, or local")
    try:
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
    except (OSError, OverflowError) as e:
        raise InputError(f"--address {address}: nobody listens there ({e}); start a cluster, or use --address local") from e


@dataclass
class _Actor:
    handle: Any
    slot: Slot
    is_ready: bool = False
    hold_key: str | None = None
    """Key of the hold that the actor was last told to open."""
    opening: Any = None
    """Reference that becomes ready when that hold is open."""


class RayExecutor:
    """Slots on the cluster that `connect` has connected to.

    A unit without a hold runs as a CPU task, or on an idle worker if workers occupy all CPUs.
    """

    def __init__(self, resources: Resources, keeps_connection: bool = False) -> None:
        """keeps_connection: `disconnect` does nothing, because the connection is the caller's."""
        self._resources, self._keeps_connection = resources, keeps_connection
        self._totals: dict[str, float] = {}
        self._totals_at = 0.0
        self._num_gpus = resources.num_gpus if resources.num_gpus is not None else min(1.0, self._total("GPU"))
        self._worker_class = ray.remote(num_cpus=resources.num_cpus, num_gpus=self._num_gpus, max_restarts=0)(Worker)
        self._task = ray.remote(num_cpus=1, max_retries=0)(_run_task)
        self._actors: dict[str, _Actor] = {}
        self._running: dict[Any, tuple[Slot, Unit | None]] = {}
        self._openings: dict[Any, _Actor] = {}
        self._busy: set[str] = set()
        self._num_tasks = 0
        self._num_named = 0
        self._metrics = UnitMetrics()
        self._cancelled: dict[str, str] = {}
        self._numbers = itertools.count()
        self._num_wanted = 0
        self._num_failed_starts = 0

    def _total(self, name: str) -> float:
        """Total amount of a resource in the cluster. Refreshed every few seconds, since nodes come and go."""
        if time.monotonic() - self._totals_at > _RESOURCES_TTL_S:
            self._totals, self._totals_at = ray.cluster_resources(), time.monotonic()
        return self._totals.get(name, 0.0)

    @property
    def num_workers(self) -> int:
        """The setting `num_workers`, else the number of workers that the cluster has room for now."""
        return self._resources.num_workers or max(1, self._room_for_workers())

    def _room_for_workers(self) -> int:
        by_cpu = int(self._total("CPU") // self._resources.num_cpus)
        return min(by_cpu, int(self._total("GPU") // self._num_gpus)) if self._num_gpus else by_cpu

    @property
    def num_running(self) -> int:
        """Number of running workers' units and tasks."""
        return len(self._busy) + self._num_tasks

    def want(self, units: Sequence[Unit]) -> None:
        """Set the number of workers to as many as can be kept busy. Without GPUs, workers also count for CPU units."""
        held = {unit.hold.key for unit in units if unit.hold}
        alone = sum(1 for unit in units if unit.hold is None and (unit.on_worker or not self._num_gpus))
        self._num_wanted = max(len(held) + alone, 1 if self._actors else 0)

    def _start_workers(self) -> None:
        """Start the wanted workers as far as the cluster has room. Nodes that join later are used at the next call."""
        wanted = min(self._num_wanted, self.num_workers)
        while len(self._actors) < wanted:
            slot = Slot(f"worker-{next(self._numbers)}", is_worker=True)
            handle: Any = self._worker_class.options(scheduling_strategy="SPREAD").remote(self._resources.log_level, True)
            self._actors[slot.id] = _Actor(handle, slot)
            self._running[handle.__ray_ready__.remote()] = (slot, None)

    def free_slots(self) -> Iterator[Slot]:
        """Idle workers, then CPU tasks for the CPUs that workers leave free.
        A generator: each slot is made when it is taken."""
        self._start_workers()
        yield from [actor.slot for actor in self._actors.values() if actor.is_ready and actor.slot.id not in self._busy]
        room = int(self._total("CPU")) - len(self._actors) * self._resources.num_cpus
        if not self._actors:
            room = max(room, 1)  # an autoscaler adds a first node only when work is waiting
        for number in range(self._num_tasks, room * _TASKS_PER_CPU):
            yield Slot(f"task-{next(self._numbers)}", is_worker=False, is_queued=number >= room)

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Send the unit to its worker, or start a task for it."""
        name = self._name(unit)
        if slot.is_worker:
            self._busy.add(slot.id)
            actor = self._actors[slot.id]
            if unit.hold is not None:
                self._open(actor, unit.hold)
            elif unit.on_worker:  # the worker closes its hold to run this unit
                actor.hold_key = None
            ref = actor.handle.run.options(name=name).remote(unit)
        else:
            self._num_tasks += 1
            ref = self._task.options(name=name).remote(unit, self._resources.log_level)
        self._running[ref] = (slot, unit)

    def open_ahead(self, slot: Slot, hold: Hold, is_free: bool) -> None:
        """A free worker opens the hold at once. A busy one reads its files in the background, from the end of its current unit
        on. The results of these calls are ignored."""
        actor = self._actors[slot.id]
        if is_free:
            self._open(actor, hold)
        else:
            actor.handle.read_ahead.remote(hold)

    def _open(self, actor: _Actor, hold: Hold) -> None:
        """Open a hold in a separate call, so that its end can be observed. The unit's own call raises any error of it again."""
        if actor.hold_key != hold.key:
            actor.hold_key, actor.opening = hold.key, actor.handle.open_ahead.remote(hold)
            self._openings[actor.opening] = actor

    def is_opening(self, slot: Slot) -> bool:
        """Whether the actor's last call to open a hold has not ended."""
        actor = self._actors.get(slot.id)
        return actor is not None and actor.opening is not None

    def _name(self, unit: Unit) -> str:
        """Name of the unit in Ray's dashboard. Ray keeps a time series for every name ever used, which takes 15 kB in this
        process and one more in each scrape. So only the first units get names of their own; later ones get the name of their
        stage."""
        if self._num_named == _MAX_NAMES:
            return unit.stage
        self._num_named += 1
        return f"{unit.stage} {unit.label}"

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """Units that have ended, with their outcomes. The death of a worker is an outcome, too."""
        refs = [*self._running, *self._openings]
        if not refs:
            time.sleep(timeout_s)
            return []
        ready, _ = ray.wait(refs, num_returns=1, timeout=timeout_s)
        if ready:
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        ended = []
        for ref in ready:
            if ref in self._openings:
                self._opened(ref)
                continue
            slot, unit = self._running.pop(ref)
            try:
                value = ray.get(ref)
            except RayTaskError as e:
                value = Outcome("", 0.0, {}, Failure("error", str(e.cause or e), str(e)))
                if unit is None:
                    self._forget(slot)
            except RayError as e:
                value = Outcome("", 0.0, {}, self._failure(slot, e))
                self._forget(slot)
            if unit is None:
                self._started(slot, value)
                continue
            if slot.is_worker:
                self._busy.discard(slot.id)
                if value.failure is not None and slot.id in self._actors:
                    self._actors[slot.id].hold_key = None  # a failing worker may have closed its hold
            else:
                self._num_tasks -= 1
            self._metrics.note(unit, value)
            ended.append((slot, unit, value))
        return ended

    def _opened(self, ref: Any) -> None:
        actor = self._openings.pop(ref)
        if actor.opening == ref:
            actor.opening = None

    def _started(self, slot: Slot, value: Any) -> None:
        """Handle the end of a worker's start, successful or not. Raises RunFailed after several failures in a row.

        A node's death does not count as a failure. Until Ray notices it, Ray sends new workers there, and all of these fail.
        """
        if not isinstance(value, Outcome):
            self._num_failed_starts = 0
            if slot.id in self._actors:
                self._actors[slot.id].is_ready = True
            return
        if value.failure is not None and value.failure.kind == "node":
            return
        self._num_failed_starts += 1
        if self._num_failed_starts >= _MAX_FAILED_STARTS and value.failure is not None:
            raise RunFailed(
                f"workers cannot start ({self._num_failed_starts} tries): {value.failure.message}\n{value.failure.detail}\n"
                "every node needs hcsmoe and what it depends on: install them by an image, ray job submit --working-dir, or "
                "runtime_env"
            )

    def _failure(self, slot: Slot, error: RayError) -> Failure:
        text = str(error).strip()
        if slot.id in self._cancelled:
            return Failure("lost", self._cancelled.pop(slot.id))
        if isinstance(error, OutOfMemoryError):
            return Failure("memory", "its worker was killed, since the node ran out of memory", text)
        if isinstance(error, NodeDiedError) or (isinstance(error, ActorDiedError) and "node has died" in text):
            return Failure("node", "its node died", text)
        return Failure("lost", f"its worker died ({type(error).__name__})", text)

    def _forget(self, slot: Slot) -> None:
        actor = self._actors.pop(slot.id, None)
        if actor is not None:
            ray.kill(actor.handle, no_restart=True)

    def cancel(self, slot: Slot, reason: str) -> None:
        """Kill the worker, or the process of the task."""
        if slot.id in self._cancelled:
            return
        self._cancelled[slot.id] = reason
        if slot.id in self._actors:
            ray.kill(self._actors[slot.id].handle, no_restart=True)
            return
        for ref, (running, _) in self._running.items():
            if running.id == slot.id:
                ray.cancel(ref, force=True)

    def make_room(self) -> None:
        """End all workers. This frees their holds; new workers start empty."""
        for actor in list(self._actors.values()):
            if actor.is_ready:
                self._forget(actor.slot)

    def why_idle(self) -> str:
        """One line on the resources that a worker needs and those that the cluster has."""
        return (
            f"waiting for a worker: each needs {self._resources.num_cpus} CPUs and {self._num_gpus:g} GPUs; the cluster has "
            f"{self._total('CPU'):g} CPUs and {self._total('GPU'):g} GPUs in all: add a node or lower resources"
        )

    def describe(self) -> str:
        """One line on the resources of a worker. States explicitly when the cluster has no GPU."""
        line = f"up to {self.num_workers} workers, each {self._resources.num_cpus} CPUs and {self._num_gpus:g} GPUs"
        if self._resources.num_gpus is None and not self._num_gpus:
            line += " (the cluster has no GPU now; set resources.num_gpus to wait for one)"
        return line

    def close(self) -> None:
        """End the workers."""
        for actor in list(self._actors.values()):
            self._forget(actor.slot)

    def disconnect(self) -> None:
        """Leave the cluster. A cluster that `connect` started ends."""
        if not self._keeps_connection:
            ray.shutdown()


def _run_task(unit: Unit, log_level: str) -> Outcome:
    return Worker(log_level, has_own_process=True).run(unit)
