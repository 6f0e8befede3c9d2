"""The models that a run evaluates, and what it takes to hold one of them whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.contracts.keys import Part
from stages.contracts.partition import held_bytes
from stages.contracts.paths import CHECKPOINT_DIR
from stages.contracts.spec import Run
from stages.contracts.stream_units import LayerShardArgs
from stages.contracts.text_settings import TextData
from stages.contracts.units import Hold, HoldCall

OPEN = HoldCall("stages.model.layer_shard:open_layer_shard", LayerShardArgs)
SOURCE_PART = "source"


@dataclass(frozen=True)
class Model:
    """part: what the names of its parts end with. name: as logs and the report show it. folder: of the checkpoint. made_by: the
    part that its identity follows from."""

    part: str
    name: str
    folder: Path
    made_by: Part


def models(run: Run) -> Iterator[Model]:
    """The source, then every target."""
    yield Model(SOURCE_PART, run.config.name, run.model, run.part("prepare", "model"))
    for target in run.targets:
        made_by = run.part("assemble", target.part)
        yield Model(target.part, target.name, run.run_dir / made_by.dir / CHECKPOINT_DIR, made_by)


def hold_whole(run: Run, model: Model) -> Hold:
    """All layers of a model. Units that need them share the hold, whatever part they belong to."""
    args = LayerShardArgs(str(model.folder), 0, run.survey.num_layers, run.config.resources.num_cpus)
    return Hold(f"{run.run_dir}/{model.folder}:whole", OPEN.on(args), str(run.run_dir), f"evaluate {model.name}, whole")


def whole_bytes(run: Run, num_tokens: int) -> int:
    """Memory in bytes for the source as a whole and a sequence of num_tokens tokens; no export needs more."""
    layers = (0, run.survey.num_layers)
    sequence = TextData(data=("one",), num_sequences=1, sequence_length=max(2, num_tokens), tokens_per_shard=1)
    return held_bytes(run.survey, layers, sequence)
