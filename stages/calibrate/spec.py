"""The stage calibrate: passes token shards through layer shards and writes evidence for every MoE layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from rich import filesize

from stages.calibrate.collectors.registry import gathering
from stages.calibrate.even_tokens import step_of
from stages.contracts import paths
from stages.contracts.keys import Part
from stages.contracts.partition import held_bytes
from stages.contracts.settings import Calibration
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.stream_units import LayerShardArgs, Stream, StreamArgs, partition, stream_plan, stream_units
from stages.contracts.tensors import num_neurons
from stages.contracts.units import Hold, HoldCall, Unit, UnitCall


@dataclass(frozen=True)
class CalibrationShardArgs(LayerShardArgs):
    """routers: name of the router module of each MoE layer."""

    routers: Mapping[int, str]


@dataclass(frozen=True)
class SampleArgs:
    """Rules for sampling tokens. The settings are those of `Calibration` and `Sampling`."""

    fraction: float
    groups: int
    num_sequences: int
    sequence_length: int
    sequences_per_shard: int
    seed: int


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of the calibration set, and of each of its token shards but the last."""

    num_tokens: int
    shard_tokens: int


@dataclass(frozen=True)
class CalibrateArgs:
    """sample: None for sums over all tokens. collectors: names of the collectors used beside the default ones. counts: None if
    the token shard is the whole calibration set."""

    stream: StreamArgs
    sample: SampleArgs | None
    collectors: tuple[str, ...]
    counts: TokenCounts | None = None


@dataclass(frozen=True)
class CalibrateFacts:
    """num_tokens: tokens in the token shard."""

    num_tokens: int


@dataclass(frozen=True)
class ReduceArgs:
    """Arguments for adding up the sums of one layer over all token shards. is_sampled: whether groups of sequences are kept
    separately. collectors: names of the collectors used beside the default ones."""

    layer: int
    num_shards: int
    is_sampled: bool
    collectors: tuple[str, ...]


@dataclass(frozen=True)
class ReduceFacts:
    """num_tokens: tokens of the calibration set. never_routed: experts to which no token was routed."""

    layer: int
    num_tokens: int
    never_routed: tuple[int, ...]


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
        upstream = {"model": run.part("prepare", "model"), "tokens": run.part("prepare", "calibration")}
        yield run.new_part(self, "", settings, upstream)

    def units(self, run: Run) -> Iterator[Unit]:
        """Units that pass token shards through layer shards, then one unit per MoE layer that adds up its sums."""
        part, data, moe_layers = run.part(self.name), run.config.calibration, run.survey.moe_layers
        part_dir = Path(part.dir)
        sample, collectors = _sample(data), required_collectors(run)
        counts = TokenCounts(data.num_sequences * data.sequence_length, data.sequences_per_shard * data.sequence_length)

        def makes(layers: tuple[int, int], shard: int) -> list[Path]:
            return [paths.partial_evidence_file(part_dir, layer, shard) for layer in moe_layers if layer in range(*layers)]

        stream = Stream(
            part, run.part("prepare", "calibration"), data, str(run.model), "",
            lambda args: OPEN.on(CalibrationShardArgs(**vars(args), routers=run.survey.routers)),
            lambda args: CALIBRATE.on(CalibrateArgs(args, sample, collectors, counts)),
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
                REDUCE.on(ReduceArgs(layer, data.num_shards, sample is not None, collectors)),
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
        if "neuron_activations" in required_collectors(run):
            values = survey.num_experts * num_neurons(run.tensors)
            num_kept = -(
                -data.num_sequences * data.sequence_length // step_of(data.num_sequences * data.sequence_length, values)
            )
            kept = filesize.decimal(4 * values * num_kept)
            lines.append(
                f"activations of all neurons are kept on {num_kept:,} tokens: {kept} a layer, and twice that in passing"
            )
        if "output_gram" in required_collectors(run):
            lines.append("feature token_wise: every expert's output on every token, about 2.5 times the experts' work")
        hidden = data.num_sequences * data.sequence_length * survey.hidden_size * survey.itemsize * (len(shards) > 1)
        units = f"{stream_plan(run, part, data)} + {len(survey.moe_layers)} layers"
        return StagePlan(units, "workers", lines, disk_bytes=2 * hidden)


def required_collectors(run: Run) -> tuple[str, ...]:
    """Names of the collectors that the run's methods need beside the default ones."""
    return gathering({column for variant in run.variants for column in variant.requires})


def _sample(data: Calibration) -> SampleArgs | None:
    if data.sampling is None:
        return None
    return SampleArgs(
        **data.sampling.model_dump(),
        num_sequences=data.num_sequences,
        sequence_length=data.sequence_length,
        sequences_per_shard=data.sequences_per_shard,
        seed=data.seed,
    )


SPEC = Calibrate()
