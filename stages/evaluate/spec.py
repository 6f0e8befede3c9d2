"""The stage evaluate: perplexity of the source and of every merged checkpoint on held-out text, in all and by domain; their
answers to prompts, and their scores on tasks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from stages.checkpoint.folder import Checkpoint
from stages.contracts.keys import Part
from stages.contracts.settings import RunConfig
from stages.contracts.spec import Run, StagePlan, StageSpec, text_facts
from stages.contracts.stream_units import Stream, StreamArgs, stream_plan, stream_units
from stages.contracts.targets import Target
from stages.contracts.tasks import task_args
from stages.contracts.text_settings import Evaluation
from stages.contracts.texts import DomainShards, domain_shards
from stages.contracts.units import NoFacts, Unit, UnitCall
from stages.evaluate.backends import backend_lines, check_backend, check_engine, check_whole_tasks
from stages.evaluate.generation import check_generation, generation_parts, generation_units
from stages.evaluate.models import OPEN, SOURCE_PART, Model, models
from stages.evaluate.tasks import task_parts, task_units
from stages.harness.notes import notes_of


@dataclass(frozen=True)
class EvaluateArgs:
    """Arguments for a token shard. Its losses are computed after the last layer.

    first_sequence: index, within its domain's text, of the shard's first sequence. stride: as in `Perplexity`.
    """

    stream: StreamArgs
    first_sequence: int
    stride: int | None


@dataclass(frozen=True)
class ScoreArgs:
    """domains: token shards of each domain of the text. num_bytes: bytes of UTF-8 that the predicted tokens of each stand for,
    of domains where these are known."""

    domains: tuple[DomainShards, ...]
    num_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """loss: mean negative log-likelihood of a prediction, nats; None if it is not finite. perplexity: exponential of the loss;
    None if it overflows a float. num_predictions: number of predicted tokens. bits_per_byte: negative log-likelihood in bits
    over the bytes of the predicted text in UTF-8, which models with different tokenizers share; None if not known."""

    perplexity: float | None
    loss: float | None
    num_predictions: int
    bits_per_byte: float | None


EVALUATE = UnitCall("stages.evaluate.units:evaluate_unit", EvaluateArgs, NoFacts)
SCORE = UnitCall("stages.evaluate.units:score_unit", ScoreArgs, Scores)


class Evaluate(StageSpec):
    """Computes the perplexity of every model, and lets it answer prompts."""

    name = "evaluate"
    version = 3
    libraries = ("torch", "transformers")
    after = ("prepare", "requests", "assemble")

    def parts(self, run: Run) -> Iterator[Part]:
        """For the source and each target: a part for the held-out text, one for answers to prompts, and one for each task."""
        data = run.config.evaluation
        if data is None:
            return
        for model in models(run) if data.has_text else ():
            tokens = run.part("prepare", "evaluation")
            yield run.new_part(self, model.part, {}, {"model": model.made_by, "tokens": tokens})
        yield from generation_parts(self, run, data)
        yield from task_parts(self, run, data)

    def units(self, run: Run) -> Iterator[Unit]:
        """For each model: units that pass token shards through layer shards, one unit for the score, and one for its
        answers."""
        data = run.config.evaluation
        if data is None:
            return
        for model in models(run) if data.has_text else ():
            yield from _model_units(run, data, model)
        yield from generation_units(run, data)
        yield from task_units(run, data)

    def plan(self, run: Run) -> StagePlan:
        """Every model has the same number of units, because merging keeps the number of layers."""
        data = run.config.evaluation
        if data is None:
            return StagePlan("", "workers")
        num_models = 1 + len(run.targets)
        units = []
        if data.has_text:
            shards = stream_plan(run, run.part(self.name, SOURCE_PART), data)
            units += [f"{num_models} models x {shards}", f"{num_models} scores"]
        units += [f"{num_models} answers to prompts"] if data.generate else []
        units += [f"{num_models} x {len(task_args(run.config))} tasks"] if data.tasks else []
        return StagePlan(" + ".join(units), "workers")

    def check_surveyed(self, run: Run) -> None:
        """Refuse whole models that are too large for a worker, and tied exports that an engine cannot run."""
        if run.config.evaluation is not None:
            check_generation(run, run.config.evaluation)
            check_engine(run, run.config.evaluation)
            check_whole_tasks(run, run.config.evaluation, notes_of(run.config, run.model))

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Refuse a backend that cannot run the tasks."""
        check_backend(config, targets, notes_of(config, checkpoint.folder))

    def remarks(self, run: Run) -> Iterable[str]:
        """Which backend runs each task."""
        data = run.config.evaluation
        return backend_lines(data, notes_of(run.config, run.model)) if data is not None else ()


def _model_units(run: Run, data: Evaluation, model: Model) -> Iterator[Unit]:
    part = run.part("evaluate", model.part)
    first_of = [number * data.sequences_per_shard for shards in data.shards_by_domain.values() for number in range(len(shards))]
    stream = Stream(
        part, run.part("prepare", "evaluation"), data, str(model.folder), f"{model.name}, ", OPEN.on,
        lambda args: EVALUATE.on(EvaluateArgs(args, first_of[args.shard], data.perplexity.stride)),
    )  # fmt: skip
    units = stream_units(run, stream)
    yield from units
    last = [unit for unit in units if not unit.writes]
    args = ScoreArgs(domain_shards(data), text_facts(run, "evaluation", "num_bytes"))
    yield run.unit(part, "perplexity", SCORE.on(args), f"{model.name}, perplexity", after=last)


SPEC = Evaluate()
