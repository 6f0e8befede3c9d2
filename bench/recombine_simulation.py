"""Recombine on clusters that are not there: its real units, scheduler and driver, on workers whose time is modelled.

`python -m bench.recombine_simulation` states hours. What a unit computes is counted by `stages/recombine/needs.py`, as `plan`
counts it; rates are those of `cluster_model.Hardware` and of `Solving`. Nothing is computed.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.cluster_model import DEEPSEEK_V3, MIXTRAL, QWEN3_30B, VALUE_BYTES, Costs, Hardware, Model
from bench.simulation import SimulatedExecutor, SimulatedRun
from pipeline.config import read_config
from pipeline.driver.loop import Driver
from pipeline.executors.base import Slot
from pipeline.run.view import Inputs, RunView
from stages.contracts.survey import Survey
from stages.contracts.tensors import TensorRow
from stages.contracts.units import Hold, Unit
from stages.recombine.calls import SWEEPS, AdvanceArgs, ChooseArgs, CompareArgs, GatherArgs, SolveArgs, SourceArgs, StartArgs
from stages.recombine.needs import NUM_RIDGES, LayerNeeds, Work, layer_needs

MODELS = (MIXTRAL, QWEN3_30B, DEEPSEEK_V3)
NUM_WORKERS = (1, 8, 64)
NUM_SEQUENCES = (32, 512)
"""Of 2,048 tokens: 65,536 and 1,048,576."""
_SINGLE_BYTES = 4


@dataclass(frozen=True)
class Solving:
    """Rates that a GPU reaches beside its products of 16 bits. single_flops: products of float32. factor_flops: Cholesky
    factors and inverses of float32."""

    single_flops: float = 15e12
    factor_flops: float = 5e12


@dataclass
class RecombineExecutor(SimulatedExecutor):
    """Workers that gather, solve, choose and advance."""

    needs: LayerNeeds | None = None
    solving: Solving = field(default_factory=Solving)
    _has_read: dict[str, str] = field(default_factory=dict)
    """The layer of which each worker has read what its experts are given."""

    def open_ahead(self, slot: Slot, hold: Hold, is_free: bool) -> None:
        """Holds of a layer are one object."""
        super().open_ahead(slot, _layer_hold(hold), is_free)

    def submit(self, slot: Slot, unit: Unit) -> None:
        """Know when the unit will have ended."""
        assert unit.hold is not None
        worker = self._workers[slot.id]
        seconds = self._open_s(worker, replace(unit, hold=_layer_hold(unit.hold)))
        self._push(slot, unit, seconds + self.costs.hardware.unit_s + self._work_s(slot, unit))

    def _work_s(self, slot: Slot, unit: Unit) -> float:
        args = unit.call.args
        assert self.needs is not None
        if isinstance(args, GatherArgs):
            written_s = self._given_bytes(self._num_tokens(args.shard)) / self.costs.hardware.link_bytes_s
            return written_s + self._way_s(args.of.layer, args.shard, len(unit.reads), has_experts=False)
        if isinstance(args, SourceArgs | AdvanceArgs):
            return self._way_s(args.layer, args.shard, len(unit.reads) + len(unit.writes), has_experts=True)
        assert isinstance(args, CompareArgs | StartArgs | ChooseArgs | SolveArgs)
        seconds = self._given_s(slot, unit)
        slots_s = self.needs.hidden_size * _SINGLE_BYTES * self.needs.kept / self.costs.hardware.link_bytes_s
        if isinstance(args, CompareArgs):  # with every later expert
            num_experts = self.needs.num_experts
            seconds += self._seconds(self.needs.activations_work) / num_experts
            return seconds + self._seconds(self.needs.pairs_work(num_experts - 1 - args.expert))
        if isinstance(args, ChooseArgs):
            return seconds + self._seconds(self.needs.choose_work) + slots_s
        if isinstance(args, StartArgs):
            return seconds + self._seconds(self.needs.groups_work) + self._seconds(self.needs.start_work)
        seconds += self._seconds(self.needs.solve_work(SWEEPS, NUM_RIDGES)) + self._seconds(self.needs.router_work)
        return seconds + 2 * slots_s * self.needs.num_slots

    def _seconds(self, work: Work) -> float:
        return work.products / self.solving.single_flops + work.factors / self.solving.factor_flops

    def _given_s(self, slot: Slot, unit: Unit) -> float:
        """What the layer's experts are given is read once by a worker."""
        assert unit.hold is not None and self.needs is not None
        layer = _layer_hold(unit.hold).key
        if self._has_read.get(slot.id) == layer:
            return 0.0
        self._has_read[slot.id] = layer
        return self._given_bytes(self.needs.all_tokens) / self.costs.hardware.link_bytes_s

    def _given_bytes(self, num_tokens: int) -> float:
        """The experts' input and the target."""
        return num_tokens * self.costs.model.hidden_size * (VALUE_BYTES + _SINGLE_BYTES)

    def _way_s(self, layer: int, shard: int, num_files: int, has_experts: bool) -> float:
        """A token shard through a layer. num_files: hidden states that are read or written."""
        tokens = self._num_tokens(shard)
        flops = self._pass_flops(layer, has_experts)
        return num_files * self.costs.hidden_s(tokens) + tokens * flops / self.costs.hardware.compute_flops

    def _pass_flops(self, layer: int, has_experts: bool) -> float:
        """Operations of a token's way through a layer, its own experts alone."""
        model = self.costs.model
        if not model.is_moe(layer):
            return model.token_flops(layer, self.costs.sequence_length)
        attention = 2 * model.attention_values + 4 * self.costs.sequence_length * model.attention_width
        return attention + 2 * model.expert_values * (model.top_k * has_experts + model.num_shared)


def _layer_hold(hold: Hold) -> Hold:
    return replace(hold, key=str(hold.call.args))


def _tensors(model: Model) -> tuple[TensorRow, ...]:
    """The one row that tells how many neurons an expert has."""
    shape = (model.hidden_size, model.intermediate)
    return (
        TensorRow(
            "down", "", "BF16", shape, 0, "down", 0, "expert", 0, None, None, 1, "single", "", "", "", None, shape, "",
        ),
    )  # fmt: skip


def _survey(model: Model) -> Survey:
    return replace(model.survey(), family=model.family)


def simulate(model: Model, mode: str, num_sequences: int, num_workers: int, hardware: Hardware | None = None) -> dict[str, Any]:
    """Hours of recombine to half the experts, tied, on a cluster, how busy it was, and how often a layer was read."""
    hardware = hardware or Hardware()
    with tempfile.TemporaryDirectory() as folder:
        config = read_config(
            {
                "model": "simulated",
                "run_dir": folder,
                "calibration": {
                    "data": "simulated", "num_sequences": num_sequences, "sequence_length": 2048,
                    "tokens_per_shard": max(2048, num_sequences * 2048 // 64),
                },
                "clustering": {"method": "pairs", "pair_cost": "auto", "num_experts": [model.num_experts // 2]},
                "refit": {"mode": mode, "neurons": "choose"},
                "export": {"formats": ["tied"]},
                "resources": {"num_gpus": 1, "worker_memory": hardware.gpu_memory_bytes},
            }
        )  # fmt: skip
        inputs = Inputs(Path(folder) / "model", {"model": {"name": model.name}, "calibration": {}})
        view = RunView(config, inputs, num_workers, surveyed=(_survey(model), _tensors(model)))
        units = list(view.units("recombine"))
        (target,) = view.targets
        data = config.calibration
        costs = Costs(model, hardware, num_workers, num_sequences * 2048, 2048)
        executor = RecombineExecutor(costs, data, needs=layer_needs(view, target))
        run: Any = SimulatedRun(units, config)
        Driver([run], executor, print, executor.clock).drive()
    return {
        "mode": mode,
        "tokens": num_sequences * 2048,
        "workers": num_workers,
        "hours": executor.now_s / 3600,
        "busy": executor.busy_s / executor.now_s / num_workers,
        "reads": executor.num_reads,
    }


def simulated(models: Sequence[Model] = MODELS, num_workers: Sequence[int] = NUM_WORKERS) -> dict[str, Any]:
    """All models, modes, numbers of tokens and of workers."""
    found = {
        model.name: [
            simulate(model, mode, num_sequences, count)
            for mode in ("sequential", "one_shot")
            for num_sequences in NUM_SEQUENCES
            for count in num_workers
        ]
        for model in models
    }
    return {"hardware": asdict(Hardware()) | asdict(Solving()), "models": found}


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=list(NUM_WORKERS))
    args = parser.parse_args()
    print(json.dumps(simulated(num_workers=args.workers)))


if __name__ == "__main__":
    main()
