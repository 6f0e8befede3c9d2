"""Tiny units and an executor that a test drives by hand."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.driver.outcome import Failure, Outcome
from pipeline.driver.process import COMPUTING
from pipeline.driver.run_state import UnitFailure
from pipeline.driver.selection import delete
from pipeline.driver.worker import Worker
from pipeline.executors.base import Slot
from stages.contracts.errors import InputError
from stages.contracts.settings import Resources
from stages.contracts.units import Call, HeldJob, Hold, Job, NoFacts, Unit, UnitResult
from stages.io.files import write_bytes

RUN_DIR = "/toy"
STAGE_DIR = "toy-0"


def at(run_dir: Path, units: Sequence[Unit]) -> list[Unit]:
    """The units, in another run directory."""
    return [
        one
        if one.run_dir == str(run_dir)
        else replace(one, run_dir=str(run_dir), after=tuple(other.replace(one.run_dir, str(run_dir), 1) for other in one.after))
        for one in units
    ]


@dataclass(frozen=True)
class ToyArgs:
    """name: of the unit. writes: its transient files."""

    name: str
    writes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToyFacts:
    """held: key of what the worker holds."""

    held: str | None


@dataclass(frozen=True)
class ToyHold:
    """Something that a worker holds."""

    key: str
    bytes_read: int = 0

    def read_ahead(self, args: object) -> None:
        pass

    def close(self) -> None:
        pass


def unit(name: str, **fields: Any) -> Unit:
    """A unit that writes its name to `<name>.txt`, or to each of its transient files."""
    hold = fields.pop("hold", None)
    function = fields.pop("call", "tests.pipeline.fake:write_name")
    args = fields.pop("args", ToyArgs(name, tuple(fields.get("writes", ()))))
    defaults = {"run_dir": RUN_DIR, "stage": "toy", "part_dir": STAGE_DIR, "label": name}
    if hold:
        fields["hold"] = Hold(hold, Call("tests.pipeline.fake:open_hold", ToyHold(hold)), RUN_DIR, hold)
    return Unit(**{**defaults, "name": name, "call": Call(function, args), **fields})


OPENED: list[str] = []
"""Keys of what `open_hold` has opened in this process."""


def open_hold(args: ToyHold) -> ToyHold:
    OPENED.append(args.key)
    return args


def write_name(job: Job[ToyArgs]) -> UnitResult[ToyFacts]:
    name, writes = job.args.name, job.args.writes
    held = job.held.key if isinstance(job, HeldJob) else None
    if writes:
        files = tuple(write_bytes(job.run_dir / path, name.encode()) for path in writes)
        return UnitResult(ToyFacts(held), transient=files)
    return UnitResult(ToyFacts(held), (write_bytes(job.part_dir / f"{name}.txt", name.encode()),))


def fail_input(job: Job[ToyArgs]) -> UnitResult[NoFacts]:
    raise InputError(f"{job.args.name}: the value is 3 but at most 2 fit; use 2")


def fail_error(job: Job[ToyArgs]) -> UnitResult[NoFacts]:
    raise RuntimeError(f"{job.args.name} broke")


def chain(num_shards: int, num_tokens: int) -> list[Unit]:
    """Layer shards by token shards, as calibrate has them; and a sum for each layer shard."""
    units = []
    for shard in range(num_shards):
        for tokens in range(num_tokens):
            reads = [f"{STAGE_DIR}/hidden/{shard}-{tokens}"] if shard else []
            writes = [f"{STAGE_DIR}/hidden/{shard + 1}-{tokens}"] if shard < num_shards - 1 else []
            partial = f"{STAGE_DIR}/partial/{shard}-{tokens}"
            name = f"shard-{shard}-tokens-{tokens}"
            units.append(unit(name, reads=tuple(reads), writes=(*writes, partial), hold=f"shard-{shard}", on_worker=True))
    for shard in range(num_shards):
        units.append(unit(f"sum-{shard}", reads=tuple(f"{STAGE_DIR}/partial/{shard}-{tokens}" for tokens in range(num_tokens))))
    return units


class ToyRun:
    """A run of one stage with given units, as the driver knows runs."""

    def __init__(self, units: Sequence[Unit], run_dir: Path | str = RUN_DIR, **resources: Any) -> None:
        self.run_dir = Path(run_dir)
        self.config = SimpleNamespace(resources=Resources(**resources))
        self.is_active = self.can_advance = True
        self.done_units: dict[str, Outcome] = {}
        self.failures: list[UnitFailure] = []
        self.retries: list[str] = []
        self._units: list[Unit] | None = at(self.run_dir, units)

    def advance(self) -> list[Unit]:
        units, self._units = self._units or [], None
        self.can_advance, self.is_active = False, bool(units)
        self._num_left = len(units)
        return units

    def check_lock(self) -> None:
        pass

    def started(self, unit: Unit, worker: str) -> None:
        pass

    def done(self, unit: Unit, outcome: Outcome) -> None:
        self.done_units[unit.name] = outcome
        self.count_done()
        delete(self.run_dir, unit.reads)

    def count_done(self) -> None:
        """Once all units are done the run is to be asked for more."""
        self._num_left -= 1
        self.can_advance = not self._num_left

    def retried(self, unit: Unit, outcome: Outcome, how: str) -> None:
        assert outcome.failure is not None
        self.retries.append(f"{unit.name}: {outcome.failure.message}; {how}")

    def failed(self, failure: UnitFailure) -> None:
        self.failures.append(failure)
        self.is_active = False


class FakeExecutor:
    """Slots that a test names; units end in the order of submission, one at each `wait`, as `outcome` says.

    A worker whose unit is lost is replaced by a new one.
    """

    def __init__(
        self, workers: int, tasks: int = 0, outcome: Callable[[Slot, Unit], Failure | None] = lambda slot, unit: None
    ) -> None:
        self.slots = [Slot(f"w{n}", is_worker=True) for n in range(workers)] + [Slot(f"t{n}", False) for n in range(tasks)]
        self.outcome = outcome
        self.running: list[tuple[Slot, Unit]] = []
        self.log: list[tuple[str, str]] = []
        self.opened_ahead: list[tuple[str, str]] = []
        self.most_at_once = 0
        self.num_idle_waits = 0
        self.elapsed_s = self.open_s = 0.0
        self.opening: set[str] = set()
        self.now = 0.0
        self.cancelled: list[tuple[str, str]] = []

    def clock(self) -> float:
        """Time goes on while there is nothing to do, and as a test sets it."""
        return self.now

    def is_opening(self, slot: Slot) -> bool:
        return slot.id in self.opening

    @property
    def num_workers(self) -> int:
        return sum(slot.is_worker for slot in self.slots)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def want(self, units: Sequence[Unit]) -> None:
        pass

    def make_room(self) -> None:
        self.log.append(("all", "make room"))
        self.slots = [Slot(f"{slot.id}'", True) if slot.is_worker else slot for slot in self.slots]

    def cancel(self, slot: Slot, reason: str) -> None:
        self.cancelled.append((slot.id, reason))

    def free_slots(self) -> list[Slot]:
        busy = {slot.id for slot, _ in self.running}
        return [slot for slot in self.slots if slot.id not in busy]

    def submit(self, slot: Slot, unit: Unit) -> None:
        assert slot in self.free_slots(), f"{slot.id} is busy"
        assert slot.is_worker or not unit.on_worker, f"{unit.name} needs a worker"
        self.log.append((slot.id, unit.name))
        self.running.append((slot, unit))
        self.most_at_once = max(self.most_at_once, len(self.running))

    def open_ahead(self, slot: Slot, hold: Hold, is_free: bool) -> None:
        self.opened_ahead.append((slot.id, hold.key))

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        if not self.running:
            self.num_idle_waits += 1
            self.now += timeout_s
            assert self.num_idle_waits < 50, f"nothing runs any more after {self.log}"
            return []
        slot, unit = self.running.pop(0)
        failure = self.outcome(slot, unit)
        if failure is not None and failure.kind in ("lost", "node"):
            self.slots[self.slots.index(slot)] = Slot(f"{slot.id}'", slot.is_worker)
        return [(slot, unit, Outcome("host", self.elapsed_s, {}, failure, open_s=self.open_s))]

    def why_idle(self) -> str:
        return "no slot"

    def close(self) -> None:
        pass


def run_here(run_dir: Path, units: Sequence[Unit]) -> list[str]:
    """Run units in this process in their order, as one worker and its driver do; returns their names."""
    worker = Worker()
    for one in at(run_dir, units):
        outcome = worker.run(one)
        assert outcome.failure is None, outcome.failure
        delete(run_dir, one.reads)
    return [one.name for one in units]


@dataclass(frozen=True)
class Environment:
    """What libraries would find if they were loaded now, and whether torch has been."""

    variables: dict[str, str | None]
    has_torch: bool


def tell_environment(job: Job[ToyArgs]) -> UnitResult[Environment]:
    facts = Environment({name: os.environ.get(name) for name in COMPUTING}, "torch" in sys.modules)
    return UnitResult(facts, (write_bytes(job.part_dir / "told.txt", b""),))
