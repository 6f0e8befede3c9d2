"""Calibrations on clusters that are not there: the real units, scheduler and driver, on workers whose time is modelled.

An event-driven executor keeps a virtual clock: a unit ends when its reading, computing and writing would have (see
`cluster_model`). Nothing is computed and nobody sleeps, so 64 GPUs take a second.
"""

import argparse
import heapq
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.cluster_model import MODELS, Costs, Hardware, Model, ideal_s
from pipeline.config import read_config
from pipeline.driver.loop import Driver
from pipeline.driver.outcome import Outcome
from pipeline.executors.base import Slot
from pipeline.run.view import Inputs, RunView
from stages.calibrate.spec import CalibrateArgs, ReduceArgs
from stages.contracts.partition import layer_shards
from stages.contracts.settings import Resources, RunConfig
from stages.contracts.stream_units import LayerShardArgs, StreamArgs
from stages.contracts.text_settings import TextData
from stages.contracts.units import Hold, Unit

NUM_WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class _Worker:
    """A modelled worker: what is on its GPU, and what is on its way to the host's memory and since when it is there."""

    slot: Slot
    held: str | None = None
    coming: str | None = None
    has_come_at: float = 0.0
    open_at: float = 0.0
    busy_s: float = 0.0


@dataclass
class SimulatedExecutor:
    """Workers with a virtual clock."""

    costs: Costs
    data: TextData
    has_prefetch: bool = True
    now_s: float = 0.0
    num_reads: int = 0
    _workers: dict[str, _Worker] = field(default_factory=dict)
    _running: list[tuple[float, int, float, Slot, Unit]] = field(default_factory=list)
    _num_submitted: int = 0

    def __post_init__(self) -> None:
        for number in range(self.num_workers):
            slot = Slot(f"worker-{number}", is_worker=True)
            self._workers[slot.id] = _Worker(slot)

    def clock(self) -> float:
        """Virtual seconds."""
        return self.now_s

    @property
    def num_workers(self) -> int:
        """GPUs."""
        return self.costs.num_workers

    @property
    def num_running(self) -> int:
        """Units in flight."""
        return len(self._running)

    @property
    def busy_s(self) -> float:
        """Seconds in which workers had a unit, in all."""
        return sum(worker.busy_s for worker in self._workers.values())

    def want(self, units: Sequence[Unit]) -> None:
        """All workers are there from the start."""

    def free_slots(self) -> list[Slot]:
        """Idle workers."""
        busy = {slot.id for _, _, _, slot, _ in self._running}
        return [worker.slot for worker in self._workers.values() if worker.slot.id not in busy]

    def open_ahead(self, slot: Slot, hold: Hold, is_free: bool) -> None:
        """Read a layer shard to the host's memory beside what the worker computes; an idle worker places it, too."""
        worker = self._workers[slot.id]
        if not self.has_prefetch or hold.key == worker.held:
            return
        self._read(worker, hold)
        if is_free:
            worker.held = hold.key
            worker.open_at = max(self.now_s, worker.has_come_at) + self.costs.place_s(*_layers(hold))

    def _read(self, worker: _Worker, hold: Hold) -> None:
        if worker.coming != hold.key:
            worker.coming, worker.has_come_at = hold.key, self.now_s + self.costs.read_s(*_layers(hold))
            self.num_reads += 1

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Know when the unit will have ended."""
        worker = self._workers[slot.id]
        seconds = self._open_s(worker, unit) + self.costs.hardware.unit_s
        args = unit.call.args
        if isinstance(args, ReduceArgs):
            seconds += self.costs.sum_s(args.layer, args.domains[-1].stop)
        else:
            assert isinstance(args, CalibrateArgs)
            seconds += self._pass_s(worker, unit, args.stream)
        self._push(slot, unit, seconds)

    def _push(self, slot: Slot, unit: Unit, seconds: float) -> None:
        self._workers[slot.id].busy_s += seconds
        heapq.heappush(self._running, (self.now_s + seconds, self._num_submitted, seconds, slot, unit))
        self._num_submitted += 1

    def _open_s(self, worker: _Worker, unit: Unit) -> float:
        assert unit.hold is not None
        first, stop = _layers(unit.hold)
        if worker.held != unit.hold.key:
            self._read(worker, unit.hold)
            worker.held = unit.hold.key
            worker.open_at = max(self.now_s, worker.has_come_at) + self.costs.place_s(first, stop)
        return max(0.0, worker.open_at - self.now_s)

    def _pass_s(self, worker: _Worker, unit: Unit, args: StreamArgs) -> float:
        assert unit.hold is not None
        num_tokens = self._num_tokens(args.shard)
        read_s = self.costs.hidden_s(num_tokens) if unit.reads else 0.0
        worker.has_come_at += read_s  # the link is shared with what comes ahead
        seconds = read_s + (0.0 if args.is_last else self.costs.hidden_s(num_tokens))
        for layer in range(*_layers(unit.hold)):
            seconds += self.costs.compute_s(layer, num_tokens)
            seconds += self.costs.partial_statistics_s() if self.costs.model.is_moe(layer) else 0.0
        return seconds

    def _num_tokens(self, shard: int) -> int:
        left = self.data.num_sequences - shard * self.data.sequences_per_shard
        return min(left, self.data.sequences_per_shard) * self.data.sequence_length

    def is_opening(self, slot: Slot) -> bool:
        """Not told apart: the time of a unit here includes that of opening its hold."""
        return False

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        """Let the clock go on to the next end of a unit."""
        assert self._running, "nothing runs and nothing will"
        self.now_s = self._running[0][0]
        ended = []
        while self._running and self._running[0][0] <= self.now_s:
            _, _, seconds, slot, unit = heapq.heappop(self._running)
            ended.append((slot, unit, Outcome("simulated", seconds, {})))
        return ended

    def cancel(self, slot: Slot, reason: str) -> None:
        """Nothing hangs."""
        raise AssertionError(reason)

    def make_room(self) -> None:
        """Nothing runs out of memory."""
        raise AssertionError("no unit fails here")

    def why_idle(self) -> str:
        """Nothing waits for workers."""
        raise AssertionError("workers are always there")

    def describe(self) -> str:
        """How many workers."""
        return f"{self.num_workers} simulated workers"

    def close(self) -> None:
        """Nothing to end."""

    def disconnect(self) -> None:
        """Nothing to leave."""


def _layers(hold: Hold) -> tuple[int, int]:
    assert isinstance(hold.call.args, LayerShardArgs)
    return hold.call.args.first, hold.call.args.stop


class SimulatedRun:
    """Units of one stage, as the driver knows runs."""

    def __init__(self, units: Sequence[Unit], config: RunConfig) -> None:
        self.run_dir, self.config, self.is_active, self.can_advance = units[0].run_dir, config, True, True
        self._units, self._num_left = list(units), len(units)

    def advance(self) -> list[Unit]:
        """All units at once."""
        units, self._units = self._units, []
        self.can_advance, self.is_active = False, bool(units)
        return units

    def check_lock(self) -> None:
        """Nobody else has this run."""

    def started(self, unit: Unit, worker: str) -> None:
        """Nothing to log."""

    def done(self, unit: Unit, outcome: Outcome) -> None:
        """Nothing to delete."""
        self._num_left -= 1
        self.can_advance = not self._num_left


def calibrate_units(model: Model, config: RunConfig, num_workers: int) -> list[Unit]:
    """The units that calibrate lists for a model of these dimensions."""
    inputs = Inputs(Path(config.run_dir) / "model", {"model": {"name": model.name}, "calibration": {}})
    return list(RunView(config, inputs, num_workers, surveyed=(model.survey(), ())).units("calibrate"))


def run_config(hardware: Hardware, run_dir: str, **settings: Any) -> RunConfig:
    """A run file with the calibration of the paper, 32 sequences of 2,048 tokens."""
    values = {
        "model": "simulated",
        "run_dir": run_dir,
        "calibration": {"data": "simulated", "num_sequences": 32, "sequence_length": 2048, **settings.pop("calibration", {})},
        "clustering": {"num_experts": 1},
        "resources": {"num_gpus": 1, "worker_memory": hardware.gpu_memory_bytes, **settings},
    }
    return read_config(values)


def simulate(model: Model, hardware: Hardware, num_workers: int, has_prefetch: bool = True, **settings: Any) -> dict[str, Any]:
    """Seconds of calibrate on a cluster, those of the ideal pipeline, and their ratio; how often a layer shard was read."""
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(hardware, folder, **settings)
        data = config.calibration
        units = calibrate_units(model, config, num_workers)
        num_tokens = data.num_sequences * data.sequence_length
        costs = Costs(model, hardware, num_workers, num_tokens, data.sequence_length)
        executor = SimulatedExecutor(costs, data, has_prefetch)
        run: Any = SimulatedRun(units, config)
        Driver([run], executor, print, executor.clock).drive()
    room = Resources(worker_memory=hardware.gpu_memory_bytes)
    most = max(stop - first for first, stop in layer_shards(model.survey(), data, room, num_workers=1, num_rounds=1))
    ideal = ideal_s(costs, data.micro_batch * data.sequence_length, most)
    holds = {unit.hold.key for unit in units if unit.hold}
    return {
        "workers": num_workers,
        "seconds": executor.now_s,
        "ideal_s": ideal,
        "efficiency": ideal / executor.now_s,
        "reads": executor.num_reads,
        "busy": executor.busy_s / executor.now_s / num_workers,
        "layer_shards": len(holds),
        "token_shards": data.num_shards,
    }


def main() -> None:
    """Print one line of JSON: the modelled hardware, and for each model a result for each number of workers."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=list(NUM_WORKERS))
    args = parser.parse_args()
    hardware = Hardware()
    models = {model.name: [simulate(model, hardware, count) for count in args.workers] for model in MODELS}
    print(json.dumps({"hardware": asdict(hardware), "models": models}))


if __name__ == "__main__":
    main()
