"""Benchmark 2: how near calibrate comes to the machine's own matrix multiplication. Run in a process of its own.

Counted, not estimated: torch's own counter gives the operations of a token shard's way through the layers; every
`torch.mm` in it is then repeated on its own, same shapes, strides, dtype and threads, in turn with the unit itself.
"""

import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import print_measured, timed
from bench.models import IDS_FILE, MODELS
from stages.calibrate.spec import CalibrateArgs, CalibrationShardArgs
from stages.calibrate.token_sample import ShardPlace
from stages.calibrate.units import CalibrationShard, calibrate_unit, open_shard
from stages.contracts.stream_units import StreamArgs
from stages.contracts.survey import Survey
from stages.contracts.units import HeldJob, Job
from stages.model.survey import survey_checkpoint
from stages.prepare.spec import TextArgs, TokensArgs
from stages.prepare.units import tokens_unit

Operand = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


class MatmulRecorder(TorchDispatchMode):
    """Counts matrix products by shape, stride and dtype of their two operands."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[tuple[Operand, Operand]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.products[_operand(left), _operand(right)] += 1
        elif name == "linear":
            self.products[_operand(args[0].flatten(0, -2)), _operand(args[1].T)] += 1
        return func(*args, **(kwargs or {}))


def _operand(tensor: torch.Tensor) -> Operand:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _random(operand: Operand) -> torch.Tensor:
    shape, stride, dtype = operand
    values = torch.randn(shape).to(dtype)
    return values.T.contiguous().T if stride[0] < stride[1] else values


def repeat_products(products: Counter[tuple[Operand, Operand]], least_s: float = 0.2) -> float:
    """Seconds that all products take, from the median of each kind alone."""
    total = 0.0
    with torch.inference_mode():
        for (left, right), count in products.items():
            a, b = _random(left), _random(right)
            torch.mm(a, b)
            seconds: list[float] = []
            while sum(seconds) < least_s and len(seconds) < 50:
                started = time.perf_counter()
                torch.mm(a, b)
                seconds.append(time.perf_counter() - started)
            total += statistics.median(seconds) * count
    return total


@dataclass(frozen=True)
class Opened:
    """All layers of a model, held, and how long loading took. One token shard has the whole calibration set."""

    run_dir: Path
    micro_batch: int
    place: ShardPlace
    survey: Survey
    shard: CalibrationShard
    load_s: float
    load_cpu_s: float

    @classmethod
    def of(cls, name: str, folder: Path, num_threads: int, run_dir: Path, most_sequences: int = 1 << 30) -> "Opened":
        """Load a model, and store its token ids in run_dir, or those of its first sequences."""
        spec = MODELS[name]
        num_sequences = min(spec.num_sequences, most_sequences)
        text = TextArgs(
            place="calibration", model=str(folder), trust_remote_code=False, data=(str(folder / IDS_FILE),), text_field="text",
            num_sequences=num_sequences, sequence_length=spec.sequence_length, seed=0,
        )  # fmt: skip
        tokens_unit(Job(run_dir, run_dir / "tokens", TokensArgs(text, num_sequences)))
        survey, _ = survey_checkpoint(str(folder))
        layers = CalibrationShardArgs(str(folder), 0, survey.num_layers, num_threads, survey.routers)
        opened: list[CalibrationShard] = []
        load_s, load_cpu_s = timed(lambda: opened.append(open_shard(layers)))
        num_tokens = num_sequences * spec.sequence_length
        place = ShardPlace(num_tokens, 0, num_tokens, num_sequences, num_sequences, seed=0)
        return cls(run_dir, max(1, 2048 // spec.sequence_length), place, survey, opened[0], load_s, load_cpu_s)

    def job(self, collectors: tuple[str, ...] = ()) -> HeldJob[CalibrateArgs, CalibrationShard]:
        """The token shard's way through the layers. collectors: used beside the default ones."""
        stream = StreamArgs("tokens", 0, self.micro_batch, is_last=True)
        args = CalibrateArgs(stream, sample=None, collectors=collectors, place=self.place)
        return HeldJob(self.run_dir, self.run_dir / "calibrate", args, self.shard)


def measure(name: str, folder: Path, num_threads: int, repeats: int) -> dict[str, Any]:
    """Operations, seconds of the unit and of its bare products, and the share of the rate that is reached."""
    spec = MODELS[name]
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        opened = Opened.of(name, folder, num_threads, Path(temporary))
        job = opened.job()
        with FlopCounterMode(display=False) as counter:
            calibrate_unit(job)
        with MatmulRecorder() as recorder:
            calibrate_unit(job)
        num_products_flops = sum(
            2 * left[0][0] * left[0][1] * right[0][1] * n for (left, right), n in recorder.products.items()
        )
        shares, cpu_shares, unit_s, products_s = [], [], [], []
        for _ in range(repeats):
            wall_s, cpu_s = timed(lambda: calibrate_unit(job))
            bare_s = repeat_products(recorder.products)
            rate = num_products_flops / bare_s
            unit_s.append(wall_s)
            products_s.append(bare_s)
            shares.append(counter.get_total_flops() / wall_s / rate)
            cpu_shares.append(counter.get_total_flops() / cpu_s / rate * num_threads)
    return {
        "flops": counter.get_total_flops(),
        "flops_of_products": num_products_flops,
        "num_tokens": spec.num_sequences * spec.sequence_length,
        "load_s": opened.load_s,
        "load_cpu_s": opened.load_cpu_s,
        "unit_s": unit_s,
        "products_s": products_s,
        "share": shares,
        "share_cpu": cpu_shares,
    }


if __name__ == "__main__":
    print_measured(measure)
