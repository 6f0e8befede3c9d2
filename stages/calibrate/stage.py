"""Units of calibrate: a token shard through a layer shard, and the sum over token shards for a layer."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.calibrate.partial import read_partial_statistics, write_partial_statistics
from stages.calibrate.sampled import SampledInputGatedStatistics, SampledStatistics
from stages.calibrate.sampling import Sample
from stages.calibrate.statistics import InputGatedStatistics, LayerStatistics
from stages.calibrate.totals import COLUMNS, add, finish, outputs
from stages.checkpoint.folder import Checkpoint
from stages.contracts.evidence import write_groups, write_statistics
from stages.contracts.paths import groups_file, hidden_file, partial_statistics_file, statistics_file, tokens_file
from stages.contracts.units import Job, UnitResult
from stages.model.families import Family, family_of
from stages.model.layer_shard import LayerShard
from stages.model.stream import enter, leave, read_token_ids, run_layers


@dataclass(frozen=True)
class CalibrationShard:
    """A layer shard and the routers of its MoE layers, held by a worker for all token shards."""

    shard: LayerShard
    routers: Mapping[int, str]
    family: Family

    @property
    def bytes_read(self) -> int:
        """See LayerShard."""
        return self.shard.bytes_read

    def read_ahead(self, model: str, first: int, stop: int) -> None:
        """See LayerShard."""
        self.shard.read_ahead(model, first, stop)

    def close(self) -> None:
        """See LayerShard."""
        self.shard.close()

    def watch(self, layer: int, into: dict[int, LayerStatistics], sample: Sample | None = None) -> AbstractContextManager[Any]:
        """Gather statistics of a MoE layer while it runs; leave a dense one alone. sample: None for all tokens."""
        if layer not in self.routers:
            return nullcontext()
        adapted = self.shard.adapted
        router = adapted.model.get_submodule(self.routers[layer])
        parts = (layer, self.shard.expert_weights(layer), router, self.family.score)
        if sample is None:
            into[layer] = (InputGatedStatistics if self.family.gates_input else LayerStatistics)(*parts)
        else:
            into[layer] = (SampledInputGatedStatistics if self.family.gates_input else SampledStatistics)(*parts, sample)
        return into[layer]


def open_shard(model: str, first: int, stop: int, num_threads: int, routers: Mapping[str, str]) -> CalibrationShard:
    """Load decoder layers [first, stop). routers: name of the router module of every MoE layer (plan.json)."""
    checkpoint = Checkpoint(model)
    shard = LayerShard(checkpoint, first, stop, num_threads, has_head=False, maps_experts=True)
    return CalibrationShard(shard, {int(layer): name for layer, name in routers.items()}, family_of(checkpoint.config, model))


def calibrate_unit(job: Job) -> UnitResult:
    """Send a token shard through the held layer shard.

    args: tokens_dir (relative to the run directory), shard, micro_batch (sequences), is_last (nothing reads the hidden
    states after it), sampling (args of `Sample.of`, or None). Writes the statistics of each MoE layer, and the hidden states
    unless is_last; all transient.
    """
    args, held = job.args, job.held
    shard: LayerShard = held.shard
    token_ids_ST = read_token_ids(job.run_dir / args["tokens_dir"] / tokens_file(args["shard"]))
    source = hidden_file(job.stage_dir, shard.first, args["shard"]) if shard.first else None
    sample = Sample.of(args["sampling"], args["shard"]) if args["sampling"] else None
    watched: dict[int, LayerStatistics] = {}
    hidden = enter(shard, token_ids_ST, source, args["micro_batch"])
    hidden = run_layers(shard, hidden, lambda layer: held.watch(layer, watched, sample))
    transient = [
        write_partial_statistics(partial_statistics_file(job.stage_dir, layer, args["shard"]), statistics.result())
        for layer, statistics in watched.items()
    ]
    if not args["is_last"]:
        transient.append(leave(hidden_file(job.stage_dir, shard.stop, args["shard"]), hidden))
    return UnitResult(transient=tuple(transient), facts={"num_tokens": token_ids_ST.numel()})


def reduce_unit(job: Job) -> UnitResult:
    """Sum one layer's statistics over the token shards, in their order. args: layer, num_shards, is_sampled.

    Held: the layer shard, for W_down.
    """
    layer, held = job.args["layer"], job.held
    paths = [partial_statistics_file(job.stage_dir, layer, shard) for shard in range(job.args["num_shards"])]
    total = add([read_partial_statistics(path) for path in paths])
    weights = held.shard.expert_weights(layer)
    with torch.inference_mode():
        output_sum_EGD = outputs(total, weights)
    is_sampled = job.args["is_sampled"]
    evidence = finish(total, output_sum_EGD, weights.dtype, is_sampled)
    files = [write_statistics(statistics_file(job.stage_dir, layer), evidence, COLUMNS, is_sampled)]
    if evidence.groups is not None:
        files.append(write_groups(groups_file(job.stage_dir, layer), evidence.groups))
    never_routed = np.flatnonzero(total.num_routed_E == 0).tolist()
    return UnitResult(tuple(files), facts={"num_tokens": total.num_tokens, "never_routed": never_routed})
