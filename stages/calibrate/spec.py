"""The stage calibrate: passes token shards through layer shards and writes evidence for every MoE layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from rich import filesize

from stages.calibrate.collectors.registry import FURTHER, gathering
from stages.calibrate.token_sample import RULE, ShardPlace, num_sampled
from stages.contracts import paths
from stages.contracts.keys import Part
from stages.contracts.partition import held_bytes
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.stream_units import LayerShardArgs, Stream, StreamArgs, partition, stream_plan, stream_units
from stages.contracts.survey import Survey
from stages.contracts.tensors import num_neurons
from stages.contracts.text_settings import Calibration
from stages.contracts.texts import DomainShards, domain_shards
from stages.contracts.units import Hold, HoldCall, Unit, UnitCall
from stages.contracts.work import work_text


@dataclass(frozen=True)
class CalibrationShardArgs(LayerShardArgs):
    """routers: name of the router module of each MoE layer."""

    routers: Mapping[int, str]


@dataclass(frozen=True)
class SampleArgs:
    """Rules for sampling tokens of a token shard. The settings are those of `Calibration` and `Sampling`.

    num_sequences: of the text, or of the token shard's domain. first_sequence: index among those of the shard's first sequence.
    """

    fraction: float
    groups: int
    num_sequences: int
    sequence_length: int
    first_sequence: int
    seed: int


@dataclass(frozen=True)
class CalibrateArgs:
    """sample: None for sums over all tokens. collectors: names of the collectors used beside the default ones. place: of the
    token shard; it may be left out if no collector keeps tokens one by one."""

    stream: StreamArgs
    sample: SampleArgs | None
    collectors: tuple[str, ...]
    place: ShardPlace | None = None


@dataclass(frozen=True)
class CalibrateFacts:
    """num_tokens: tokens in the token shard, without padding."""

    num_tokens: int


@dataclass(frozen=True)
class ReduceArgs:
    """Arguments for adding up the sums of one layer over the token shards of each domain. is_sampled: whether groups of
    sequences are kept separately. collectors: names of the collectors used beside the default ones."""

    layer: int
    domains: tuple[DomainShards, ...]
    is_sampled: bool
    collectors: tuple[str, ...]


@dataclass(frozen=True)
class ReduceFacts:
    """num_tokens: tokens of the calibration set. never_routed: experts to which no token was routed."""

    layer: int
    num_tokens: int
    never_routed: tuple[int, ...]


MANY_SHARDS = 1024
"""Token shards above which `plan` suggests larger ones: their sums and units take time and files."""

OPEN = HoldCall("stages.calibrate.units:open_shard", CalibrationShardArgs)
CALIBRATE = UnitCall("stages.calibrate.units:calibrate_unit", CalibrateArgs, CalibrateFacts)
REDUCE = UnitCall("stages.calibrate.units:reduce_unit", ReduceArgs, ReduceFacts)


class Calibrate(StageSpec):
    """Computes evidence of every MoE layer."""

    name = "calibrate"
    version = 5
    libraries = ("numpy", "torch", "transformers")
    after = ("prepare",)

    def parts(self, run: Run) -> Iterator[Part]:
        """One part, because all variants share one calibration."""
        data = run.config.calibration
        settings: dict[str, JsonValue] = {}
        if data.sampling is not None:
            settings = {"sampling": {**data.sampling.model_dump(), "seed": data.seed}}
        if collectors := required_collectors(run):
            settings["collectors"] = list(collectors)
        if any(FURTHER[name].keeps(1, 1) for name in collectors):
            settings["token_sample"] = RULE
        upstream = {"model": run.part("prepare", "model"), "tokens": run.part("prepare", "calibration")}
        yield run.new_part(self, "", settings, upstream)

    def units(self, run: Run) -> Iterator[Unit]:
        """Units that pass token shards through layer shards, then one unit per MoE layer that adds up its sums, by domain."""
        part, data, moe_layers = run.part(self.name), run.config.calibration, run.survey.moe_layers
        part_dir = Path(part.dir)
        collectors = required_collectors(run)

        def makes(layers: tuple[int, int], shard: int) -> list[Path]:
            return [paths.partial_evidence_file(part_dir, layer, shard) for layer in moe_layers if layer in range(*layers)]

        stream = Stream(
            part, run.part("prepare", "calibration"), data, str(run.model), "",
            lambda args: OPEN.on(CalibrationShardArgs(**vars(args), routers=run.survey.routers)),
            lambda args: CALIBRATE.on(
                CalibrateArgs(args, _sample(data, args.shard), collectors, _place(data, args.shard))
            ),
            makes,
        )  # fmt: skip
        holds: dict[int, Hold] = {}
        for unit in stream_units(run, stream):
            if unit.writes:  # layers after the last MoE layer add nothing to the evidence
                assert unit.hold is not None and isinstance(unit.hold.call.args, LayerShardArgs)
                holds |= dict.fromkeys(range(unit.hold.call.args.first, unit.hold.call.args.stop), unit.hold)
                yield unit
        for layer in moe_layers:
            yield run.unit(
                part,
                f"layer-{layer:04d}",
                REDUCE.on(ReduceArgs(layer, domain_shards(data), data.sampling is not None, collectors)),
                f"layer {layer}, sum over token shards",
                reads=[paths.partial_evidence_file(part_dir, layer, shard) for shard in range(data.num_shards)],
                hold=holds[layer],  # W_down is applied here, and the worker with this hold has it
                on_worker=True,
            )

    def plan(self, run: Run) -> StagePlan:
        """Also states the needs of a worker, because calibrate needs the most."""
        part, data, survey, resources = run.part(self.name), run.config.calibration, run.survey, run.config.resources
        shards = partition(run, part, data)
        first, stop = shards[0]
        needed = max(held_bytes(survey, layers, data) for layers in shards)
        num_workers = run.num_workers or resources.num_workers or 1
        memory = filesize.decimal(resources.worker_memory)
        lines = [
            f"layers of a layer shard: {stop - first} (counted for {num_workers} worker; resources.layers_per_shard sets it)",
            f"memory of a worker: about {filesize.decimal(needed)} of resources.worker_memory {memory}",
        ]
        if needed > resources.worker_memory:
            lines.append(
                "  that is more, since a worker holds at least one layer; lower tokens_per_shard or use a larger worker"
            )
        lines += _work_lines(survey, data)
        lines += _collector_lines(run)
        hidden = data.num_sequences * data.sequence_length * survey.hidden_size * survey.itemsize * (len(shards) > 1)
        units = f"{stream_plan(run, part, data)} + {len(survey.moe_layers)} layers"
        return StagePlan(units, "workers", lines, disk_bytes=2 * hidden)


def _work_lines(survey: Survey, data: Calibration) -> list[str]:
    """How much there is to compute, and how long that takes at stated rates; and whether there are very many units."""
    flops = data.num_sequences * data.sequence_length * flops_a_token(survey, data)
    lines = [f"calibrate computes about {work_text(flops)}"]
    if data.num_shards > MANY_SHARDS:
        lines.append(
            f"  {data.num_shards:,} token shards are very many; with tokens_per_shard "
            f"{-(-data.num_sequences * data.sequence_length // MANY_SHARDS):,} there are about {MANY_SHARDS:,}"
        )
    return lines


def flops_a_token(survey: Survey, data: Calibration) -> float:
    """Floating-point operations for a token, two a weight. Every expert's gate and up projections run on every token, or on the
    sampled ones; W_down of routed experts alone, since its mean output follows from a mean. Attention scores are left out."""
    share = data.sampling.fraction if data.sampling is not None else 1.0
    routed = survey.top_k / survey.num_experts
    up = share + (routed if data.sampling is not None else 0.0)
    experts = sum(survey.layer_expert_bytes) / survey.itemsize
    rest = sum(survey.layer_bytes) / survey.itemsize - experts
    return 2 * (rest + experts * (2 / 3 * up + 1 / 3 * routed))


def _collector_lines(run: Run) -> list[str]:
    """What evidence costs that only some methods need."""
    data, survey, collectors, lines = run.config.calibration, run.survey, required_collectors(run), list[str]()
    for name in collectors:
        if (kept := FURTHER[name].keeps(survey.num_experts, num_neurons(run.tensors))) is not None:
            counts = data.sequences_by_domain.values()
            num_kept = sum(num_sampled(kept.most, n * data.sequence_length, n, data.num_sequences) for n in counts)
            size, passing = (filesize.decimal(num_bytes * kept.num_values * num_kept) for num_bytes in (kept.itemsize, 8))
            lines.append(f"{kept.what} are kept on {num_kept:,} tokens: {size} a layer, {passing} until they are joined")
    if "output_gram" in collectors:
        lines.append("feature token_wise: every expert's output on every token, about 2.5 times the experts' work")
    return lines


def required_collectors(run: Run) -> tuple[str, ...]:
    """Names of the collectors that the run's methods need beside the default ones."""
    return gathering({column for variant in run.variants for column in variant.requires})


def _domain_of(data: Calibration, shard: int) -> tuple[str, int]:
    """The domain of a token shard, and the number of its sequences before the shard's."""
    ((domain, shards),) = [(name, shards) for name, shards in data.shards_by_domain.items() if shard in shards]
    return domain, (shard - shards.start) * data.sequences_per_shard


def _place(data: Calibration, shard: int) -> ShardPlace:
    domain, first = _domain_of(data, shard)
    num_sequences = data.sequences_by_domain[domain]
    return ShardPlace(
        num_tokens=min(data.sequences_per_shard, num_sequences - first) * data.sequence_length,
        first=first * data.sequence_length,
        domain_tokens=num_sequences * data.sequence_length,
        domain_sequences=num_sequences,
        all_sequences=data.num_sequences,
        seed=data.seed,
    )


def _sample(data: Calibration, shard: int) -> SampleArgs | None:
    if data.sampling is None:
        return None
    domain, first = _domain_of(data, shard)
    return SampleArgs(
        **data.sampling.model_dump(),
        num_sequences=data.sequences_by_domain[domain],
        sequence_length=data.sequence_length,
        first_sequence=first,
        seed=data.seed,
    )


SPEC = Calibrate()
