"""The stage evaluate: perplexity of the source and of every merged checkpoint on held-out text, in all and by domain."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.contracts.keys import Part
from stages.contracts.paths import CHECKPOINT_DIR
from stages.contracts.settings import Evaluation
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.stream_units import LayerShardArgs, Stream, StreamArgs, stream_plan, stream_units
from stages.contracts.texts import DomainShards, domain_shards
from stages.contracts.units import HoldCall, NoFacts, Unit, UnitCall

SOURCE_PART = "source"


@dataclass(frozen=True)
class EvaluateArgs:
    """Arguments for a token shard. Its losses are computed after the last layer."""

    stream: StreamArgs


@dataclass(frozen=True)
class ScoreArgs:
    """domains: token shards of each domain of the text."""

    domains: tuple[DomainShards, ...]


@dataclass(frozen=True)
class Scores:
    """loss: mean negative log-likelihood of a prediction, nats; None if it is not finite. perplexity: exponential of the loss;
    None if it overflows a float. num_predictions: number of predicted tokens."""

    perplexity: float | None
    loss: float | None
    num_predictions: int


OPEN = HoldCall("stages.model.layer_shard:open_layer_shard", LayerShardArgs)
EVALUATE = UnitCall("stages.evaluate.units:evaluate_unit", EvaluateArgs, NoFacts)
SCORE = UnitCall("stages.evaluate.units:score_unit", ScoreArgs, Scores)


class Evaluate(StageSpec):
    """Computes the perplexity of every model."""

    name = "evaluate"
    version = 2
    libraries = ("torch", "transformers")
    after = ("prepare", "assemble")

    def parts(self, run: Run) -> Iterator[Part]:
        """One part for the source and one per target; none without held-out text."""
        if run.config.evaluation is None:
            return
        tokens = run.part("prepare", "evaluation")
        yield run.new_part(self, SOURCE_PART, {}, {"model": run.part("prepare", "model"), "tokens": tokens})
        for target in run.targets:
            yield run.new_part(self, target.part, {}, {"model": run.part("assemble", target.part), "tokens": tokens})

    def units(self, run: Run) -> Iterator[Unit]:
        """For each model: units that pass token shards through layer shards, and one unit for the score."""
        data = run.config.evaluation
        if data is None:
            return
        yield from _model_units(run, data, run.part(self.name, SOURCE_PART), run.model, run.config.name)
        for target in run.targets:
            folder = run.run_dir / run.part("assemble", target.part).dir / CHECKPOINT_DIR
            yield from _model_units(run, data, run.part(self.name, target.part), folder, target.name)

    def plan(self, run: Run) -> StagePlan:
        """Every model has the same number of units, because merging keeps the number of layers."""
        data = run.config.evaluation
        if data is None:
            return StagePlan("", "workers")
        num_models = 1 + len(run.targets)
        shards = stream_plan(run, run.part(self.name, SOURCE_PART), data)
        return StagePlan(f"{num_models} models x {shards} + {num_models} scores", "workers")


def _model_units(run: Run, data: Evaluation, part: Part, model: Path, name: str) -> Iterator[Unit]:
    stream = Stream(
        part, run.part("prepare", "evaluation"), data, str(model), f"{name}, ", OPEN.on,
        lambda args: EVALUATE.on(EvaluateArgs(args)),
    )  # fmt: skip
    units = stream_units(run, stream)
    yield from units
    last = [unit for unit in units if not unit.writes]
    yield run.unit(part, "perplexity", SCORE.on(ScoreArgs(domain_shards(data))), f"{name}, perplexity", after=last)


SPEC = Evaluate()
