"""Units of calibrate: pass a token shard through a layer shard; compute a layer's evidence from the sums of all shards."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.cells import ALL_TOKENS, Cells, Sample
from stages.calibrate.collectors.base import Collector
from stages.calibrate.collectors.registry import DEFAULT, DEFAULT_COLUMNS, FURTHER, collectors
from stages.calibrate.spec import CalibrateArgs, CalibrateFacts, CalibrationShardArgs, ReduceArgs, ReduceFacts
from stages.calibrate.sums import add_up, evidence_of, read_partial_sums, write_partial_sums
from stages.calibrate.token_sample import ShardPlace
from stages.calibrate.watcher import Watcher
from stages.calibrate.weight_products import WeightProducts
from stages.checkpoint.folder import Checkpoint
from stages.contracts.evidence import LayerEvidence, write_column, write_groups, write_statistics
from stages.contracts.paths import column_file, domain_dir, groups_file, partial_evidence_file, statistics_file, tokens_file
from stages.contracts.texts import DomainShards
from stages.contracts.tokens import read_place
from stages.contracts.units import HeldJob, UnitResult
from stages.contracts.windows import NO_TOKEN
from stages.io.files import WrittenFile
from stages.model.families import Family, family_of
from stages.model.layer_shard import LayerShard
from stages.model.routing import choice_bias
from stages.model.stream import Stream, hidden_files, pass_through, read_token_ids


@dataclass(frozen=True)
class CalibrationShard:
    """A layer shard and the routers of its MoE layers. A worker holds it for all token shards."""

    shard: LayerShard
    routers: Mapping[int, str]
    family: Family

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoint that loading has read."""
        return self.shard.bytes_read

    def read_ahead(self, args: object) -> None:
        """Start to read the layers of the next layer shard in the background."""
        self.shard.read_ahead(args)

    def close(self) -> None:
        """Free all weights."""
        self.shard.close()

    def watch(
        self,
        layer: int,
        into: dict[int, Watcher],
        cells: Cells = ALL_TOKENS,
        gathered: Sequence[Collector] = DEFAULT,
        place: ShardPlace | None = None,
        is_token_T: Tensor | None = None,
    ) -> AbstractContextManager[object]:
        """Watch a layer while it runs. Does nothing for a dense layer. place: of the token shard, for collectors that keep
        tokens one by one. is_token_T: False for padding; None if there is none."""
        if layer not in self.routers:
            return nullcontext()
        router = self.shard.adapted.model.get_submodule(self.routers[layer])
        weights = self.shard.expert_weights(layer)
        bias_E = choice_bias(self.shard.adapted.layers[layer], weights.num_experts)
        into[layer] = Watcher(layer, weights, router, self.family, cells, gathered, place, bias_E, is_token_T)
        return into[layer]


def open_shard(args: CalibrationShardArgs) -> CalibrationShard:
    """Load decoder layers [first, stop)."""
    checkpoint = Checkpoint(args.model)
    shard = LayerShard(checkpoint, args.first, args.stop, args.num_threads, has_head=False, maps_experts=True)
    return CalibrationShard(shard, args.routers, family_of(checkpoint.config, args.model))


def calibrate_unit(job: HeldJob[CalibrateArgs, CalibrationShard]) -> UnitResult[CalibrateFacts]:
    """Pass a token shard through the held layer shard. Writes the sums of each MoE layer, and the hidden states for the next
    layer shard. All these files are transient."""
    args, held, number = job.args.stream, job.held, job.args.stream.shard
    path = job.run_dir / args.tokens_dir / tokens_file(number)
    token_ids_ST, place = read_token_ids(path), job.args.place
    is_token_T = (token_ids_ST != NO_TOKEN).flatten()
    num_tokens = int(is_token_T.sum())
    if place is not None and (unpacked := read_place(path)) is not None:
        place = replace(place, num_tokens=num_tokens, first=unpacked.first, domain_tokens=unpacked.num_tokens)
    cells = Sample.of(job.args.sample) if job.args.sample else ALL_TOKENS
    gathered = collectors(job.args.collectors)
    watched: dict[int, Watcher] = {}
    stream = Stream(
        *hidden_files(job.part_dir, args, held.shard),
        around=lambda layer: held.watch(layer, watched, cells, gathered, place, None if is_token_T.all() else is_token_T),
    )
    passed = pass_through(held.shard, token_ids_ST, args.micro_batch, {"source": stream})
    sums = [
        write_partial_sums(partial_evidence_file(job.part_dir, layer, number), watcher.result())
        for layer, watcher in watched.items()
    ]
    return UnitResult(CalibrateFacts(num_tokens), transient=(*sums, *passed.files))


def reduce_unit(job: HeldJob[ReduceArgs, CalibrationShard]) -> UnitResult[ReduceFacts]:
    """Add the sums of one layer over the token shards, in their order, and write its evidence, for each domain.
    Needs the layer shard for W_down."""
    args = job.args
    used_E, num_tokens, files = np.zeros(1, dtype=np.int64), 0, list[WrittenFile]()
    products = WeightProducts(job.held.shard.expert_weights(args.layer))
    for domain in args.domains:
        evidence = _domain_evidence(job, domain, products)
        files += _written(domain_dir(job.part_dir, domain.name), evidence, args)
        used_E, num_tokens = used_E + evidence["num_routed_tokens"], num_tokens + evidence.num_tokens
    return UnitResult(ReduceFacts(args.layer, num_tokens, tuple(np.flatnonzero(used_E == 0).tolist())), files)


def _domain_evidence(
    job: HeldJob[ReduceArgs, CalibrationShard], domain: DomainShards, products: WeightProducts
) -> LayerEvidence:
    args, gathered = job.args, collectors(job.args.collectors)
    paths = [partial_evidence_file(job.part_dir, args.layer, shard) for shard in range(domain.first, domain.stop)]
    total = add_up((read_partial_sums(path) for path in paths), gathered)
    with torch.inference_mode():
        return evidence_of(total, gathered, products, args.is_sampled)


def _written(folder: Path, evidence: LayerEvidence, args: ReduceArgs) -> list[WrittenFile]:
    files = [write_statistics(statistics_file(folder, args.layer), evidence, DEFAULT_COLUMNS, args.is_sampled)]
    if evidence.groups is not None:
        files.append(write_groups(groups_file(folder, args.layer), evidence.groups))
    for column in (column for name in args.collectors for column in FURTHER[name].columns):
        files.append(write_column(column_file(folder, args.layer, column.name), evidence, column))
    return files
