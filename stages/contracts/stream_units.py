"""Units that pass token shards through layer shards. Calibrate and evaluate both use them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from stages.contracts import paths
from stages.contracts.keys import Part, key_of
from stages.contracts.partition import LayerRange, held_bytes, layer_shards, read_partition
from stages.contracts.spec import Run
from stages.contracts.text_settings import TextData
from stages.contracts.units import Call, Hold, Unit
from stages.io.files import write_json

PARTITION_FILE = "partition.json"


@dataclass(frozen=True)
class LayerShardArgs:
    """Layers [first, stop) of a checkpoint folder, and the CPU threads of the worker that holds these layers."""

    model: str
    first: int
    stop: int
    num_threads: int


@dataclass(frozen=True)
class StreamArgs:
    """Arguments for passing a token shard through a held layer shard.

    tokens_dir: folder of the text's token shards, relative to the run directory. shard: index of the token shard. micro_batch:
    sequences that run at once. is_last: whether the layer shard ends with the model's last layer, so that its hidden states are
    not written.
    """

    tokens_dir: str
    shard: int
    micro_batch: int
    is_last: bool


@dataclass(frozen=True)
class Stream:
    """Token shards of one text that pass through all layers of one model.

    part: part that the units belong to. tokens: part of the text. label: name of the model, put before unit labels in the log;
    may be empty. open_layers: the call that opens a layer shard. run_layers: the call of a unit. makes: transient files that a
    unit writes in addition to its hidden states, by layers and token shard. shares_layers: whether the stage's parts that cut
    the same model in the same way share loaded layer shards.
    """

    part: Part
    tokens: Part
    data: TextData
    model: str
    label: str
    open_layers: Callable[[LayerShardArgs], Call]
    run_layers: Callable[[StreamArgs], Call]
    makes: Callable[[LayerRange, int], Iterable[Path]] = lambda layers, shard: ()
    shares_layers: bool = False


def partition(run: Run, part: Part, data: TextData) -> list[LayerRange]:
    """The layer shards of a part. They are stored in its directory, so that a rerun with another number of workers reuses
    finished units."""
    path = run.run_dir / part.dir / PARTITION_FILE
    resources = run.config.resources
    asked: dict[str, JsonValue] = resources.model_dump(include={"worker_memory", "layers_per_shard"})
    kept = read_partition(path, run.survey.num_layers)
    if kept is not None and kept.asked == asked:
        return kept.layer_shards
    shards = layer_shards(run.survey, data, resources, run.num_workers or 1)
    if run.num_workers is not None:
        write_json(path, {"asked": asked, "layer_shards": shards})
    return shards


def stream_units(run: Run, stream: Stream) -> list[Unit]:
    """Units (layer shard, token shard), ordered by layer shard.
    Each reads the hidden states that the unit of the previous layer shard wrote."""
    part, data, part_dir = stream.part, stream.data, Path(stream.part.dir)
    units = []
    shards = partition(run, part, data)
    # units of equal cuts alone may share a hold: only then every hold's units wait for earlier holds alone
    owner = (
        f"{part.stage}:{stream.model}:{key_of({'layer_shards': [list(cut) for cut in shards]})}"
        if stream.shares_layers
        else part.dir
    )
    for first, stop in shards:
        layers_label = f"{stream.label}layers {first}-{stop - 1}"
        hold = Hold(
            f"{run.run_dir}/{owner}:{first}-{stop}",
            stream.open_layers(LayerShardArgs(stream.model, first, stop, run.config.resources.num_cpus)),
            str(run.run_dir),
            f"{part.stage} {layers_label}",
        )
        is_last = stop == run.survey.num_layers
        for shard in range(data.num_shards):
            writes = [] if is_last else [paths.hidden_file(part_dir, stop, shard)]
            writes += stream.makes((first, stop), shard)
            unit = run.unit(
                part,
                # units with permanent output are not named after the layer range, so that another partition reuses them
                f"layers-{first:04d}-{stop:04d}/tokens-{shard:04d}" if writes else f"tokens-{shard:04d}",
                stream.run_layers(StreamArgs(stream.tokens.dir, shard, data.micro_batch, is_last)),
                f"{layers_label}, tokens {shard + 1}/{data.num_shards}",
                reads=[paths.hidden_file(part_dir, first, shard)] if first else [],
                writes=writes,
                hold=hold,
                on_worker=True,
                memory_bytes=held_bytes(run.survey, (first, stop), data),
            )
            units.append(unit)
    return units


def stream_plan(run: Run, part: Part, data: TextData) -> str:
    """Number of units of a stream, in words, for `plan`."""
    return f"{len(partition(run, part, data))} layer shards x {data.num_shards} token shards"
