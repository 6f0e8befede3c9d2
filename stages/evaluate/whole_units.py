"""Units in which a whole model answers what a task asks: a shard of its requests, or a slice of its prompts."""

from collections.abc import Callable

from stages.contracts.prompts import prompts_file, read_prompts, texts_file, write_texts
from stages.contracts.requests import answers_file, read_requests, requests_file, write_answers
from stages.contracts.units import HeldJob, UnitResult
from stages.evaluate.tasks import TaskFacts, WholeArgs
from stages.harness.attempts import attempted
from stages.harness.engine import Engine
from stages.io.files import WrittenFile
from stages.model.layer_shard import LayerShard

Job = HeldJob[WholeArgs, LayerShard | Engine]


def answers_unit(job: Job) -> UnitResult[TaskFacts]:
    """Answer a shard of log-likelihood requests."""

    def answer() -> WrittenFile:
        from stages.harness.models import answers_of

        rows = read_requests(requests_file(job.run_dir / job.args.requests_dir, job.args.number))
        return write_answers(answers_file(job.part_dir, job.args.number), answers_of(_model(job), rows))

    return _attempted(job, "requests", answer)


def texts_unit(job: Job) -> UnitResult[TaskFacts]:
    """Generate a text for each prompt of a slice. A task that samples draws from a seed of the slice's own."""

    def generate() -> WrittenFile:
        from stages.harness.models import texts_of
        from stages.harness.tasks import seed_model

        prompts = read_prompts(prompts_file(job.run_dir / job.args.requests_dir, job.args.number))
        model = _model(job)
        seed_model(job.args.task, job.args.number)
        return write_texts(texts_file(job.part_dir, job.args.number), texts_of(model, prompts))

    return _attempted(job, "prompts", generate)


def _attempted(job: Job, kind: str, act: Callable[[], WrittenFile]) -> UnitResult[TaskFacts]:
    from stages.harness.tasks import quiet

    def quietly() -> UnitResult[TaskFacts]:
        with quiet():
            return UnitResult(TaskFacts(), (act(),))

    return attempted(job.part_dir, quietly, TaskFacts, f"failure-{kind}-{job.args.number:04d}")


def _model(job: Job) -> object:
    from stages.harness.models import whole_model

    if isinstance(job.held, Engine):
        return job.held.lm
    args = job.args
    return whole_model(job.held, args.task.trust_remote_code, args.task.max_length, args.batch_size)
