"""Units of calibrate: a token shard through a layer shard, and the sum over token shards for a layer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.calibrate.statistics import InputGatedStatistics, LayerStatistics
from stages.calibrate.totals import add, finish, outputs
from stages.calibrate.writing import write_partial_statistics, write_statistics
from stages.common import tables
from stages.common.checkpoint import Checkpoint
from stages.common.families import Family, family_of
from stages.common.layer_shard import LayerShard
from stages.common.paths import hidden_file, partial_statistics_file, statistics_file, tokens_file
from stages.common.streaming import enter, leave, run_layers
from stages.common.unit import Job, UnitResult


@dataclass(frozen=True)
class CalibrationShard:
    """A layer shard and the routers of its MoE layers, held by a worker for all token shards."""

    shard: LayerShard
    routers: Mapping[int, str]
    family: Family

    def watch(self, layer: int, into: dict[int, LayerStatistics]) -> AbstractContextManager[Any]:
        """Gather statistics of a MoE layer while it runs; leave a dense one alone."""
        if layer not in self.routers:
            return nullcontext()
        adapted = self.shard.adapted
        router = adapted.model.get_submodule(self.routers[layer])
        kind = InputGatedStatistics if self.family.gates_input else LayerStatistics
        into[layer] = kind(layer, adapted.experts_modules()[layer], router, self.family.score)
        return into[layer]


def open_shard(model: str, first: int, stop: int, num_threads: int, routers: Mapping[str, str]) -> CalibrationShard:
    """Load decoder layers [first, stop). routers: name of the router module of every MoE layer (plan.json)."""
    checkpoint = Checkpoint(model)
    shard = LayerShard(checkpoint, first, stop, num_threads)
    return CalibrationShard(shard, {int(layer): name for layer, name in routers.items()}, family_of(checkpoint.config, model))


def calibrate_unit(job: Job) -> UnitResult:
    """Send a token shard through the held layer shard.

    args: tokens_dir (relative to the run directory), shard, micro_batch (sequences), is_last (nothing reads the hidden
    states after it). Writes the statistics of each MoE layer, and the hidden states unless is_last; all transient.
    """
    args, held = job.args, job.held
    shard: LayerShard = held.shard
    token_ids_ST = tables.token_ids(job.run_dir / args["tokens_dir"] / tokens_file(args["shard"]))
    source = hidden_file(job.stage_dir, shard.first, args["shard"]) if shard.first else None
    watched: dict[int, LayerStatistics] = {}
    hidden = enter(shard, token_ids_ST, source, args["micro_batch"])
    hidden = run_layers(shard, hidden, lambda layer: held.watch(layer, watched))
    transient = [
        write_partial_statistics(partial_statistics_file(job.stage_dir, layer, args["shard"]), statistics.result())
        for layer, statistics in watched.items()
    ]
    if not args["is_last"]:
        transient.append(leave(hidden_file(job.stage_dir, shard.stop, args["shard"]), hidden))
    return UnitResult(transient=tuple(transient), facts={"num_tokens": token_ids_ST.numel()})


def reduce_unit(job: Job) -> UnitResult:
    """Sum one layer's statistics over the token shards, in their order. args: layer, num_shards.

    Held: the layer shard, for W_down.
    """
    layer, held = job.args["layer"], job.held
    paths = [partial_statistics_file(job.stage_dir, layer, shard) for shard in range(job.args["num_shards"])]
    total = add([tables.partial_statistics(path) for path in paths])
    experts = held.shard.adapted.experts_modules()[layer]
    with torch.inference_mode():
        statistics = finish(total, outputs(total, experts), experts.down_proj.dtype)
    file = write_statistics(statistics_file(job.stage_dir, layer), statistics, is_sampled=False)
    never_routed = np.flatnonzero(total.num_routed_E == 0).tolist()
    return UnitResult((file,), facts={"num_tokens": total.num_tokens, "never_routed": never_routed})
