"""The unit of requests: what one task asks of a model."""

from stages.checkpoint.folder import Checkpoint
from stages.contracts.requests import RequestsFacts, requests_file, rows_of, shards_of, write_requests
from stages.contracts.units import Job, UnitResult
from stages.harness.attempts import attempted
from stages.io.files import WrittenFile
from stages.requests.spec import RequestsArgs


def requests_unit(job: Job[RequestsArgs]) -> UnitResult[RequestsFacts]:
    """Write a task's log-likelihood requests in shards. Requests for generated text are counted alone: the harness makes them
    anew for the model that answers them. What a task's own code raises is a failure of this task, not of the run."""
    return attempted(job.part_dir, lambda: _record(job), lambda failure: RequestsFacts((), 0, 0, 0, 0, {}, failure))


def _record(job: Job[RequestsArgs]) -> UnitResult[RequestsFacts]:
    from stages.harness.models import Recorder
    from stages.harness.tasks import load_task, quiet, requests_of

    args = job.args
    with quiet():
        recorder = Recorder(Checkpoint(args.model), args.task.trust_remote_code, args.task.max_length)
        loaded = load_task(args.task)
        asked = requests_of(loaded, recorder, args.task)
        for kind in ("loglikelihood", "loglikelihood_rolling"):
            if kind in asked:
                getattr(recorder, kind)(asked[kind])
    rows = rows_of(recorder.requests)
    files: list[WrittenFile] = []
    for shard, cut in enumerate(shards_of(rows, args.tokens_per_shard)):
        files.append(write_requests(requests_file(job.part_dir, shard), cut))
    facts = RequestsFacts(
        kinds=tuple(sorted(asked)),
        num_requests=len(recorder.requests),
        num_shards=len(files),
        longest=len(rows[0].token_ids) if rows else 0,
        num_tokens=sum(len(row.token_ids) for row in rows),
        versions={name: str(task.VERSION) for name, task in loaded["tasks"].items()},
    )
    return UnitResult(facts, files)
