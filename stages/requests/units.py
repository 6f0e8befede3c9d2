"""The unit of requests: what one task asks of a model."""

from stages.checkpoint.folder import Checkpoint
from stages.contracts.prompts import prompts_file, write_prompts
from stages.contracts.requests import RequestsFacts, requests_file, rows_of, shards_of, write_requests
from stages.contracts.units import Job, UnitResult
from stages.harness.attempts import attempted
from stages.io.files import WrittenFile
from stages.requests.spec import RequestsArgs


def requests_unit(job: Job[RequestsArgs]) -> UnitResult[RequestsFacts]:
    """Write a task's log-likelihood requests in shards, and its prompts in slices. What a task's own code raises is a failure
    of this task, not of the run."""
    return attempted(job.part_dir, lambda: _record(job), lambda failure: RequestsFacts((), 0, 0, 0, 0, 0, 0, {}, failure))


def _record(job: Job[RequestsArgs]) -> UnitResult[RequestsFacts]:
    from stages.harness.models import Recorder
    from stages.harness.tasks import load_task, quiet, requests_of

    args = job.args
    with quiet():
        recorder = Recorder(Checkpoint(args.model), args.task.trust_remote_code, args.task.max_length)
        loaded = load_task(args.task)
        asked = requests_of(loaded, recorder, args.task)
        recorder.ask(asked)
    rows = rows_of(recorder.requests)
    files: list[WrittenFile] = []
    for shard, cut in enumerate(shards_of(rows, args.tokens_per_shard)):
        files.append(write_requests(requests_file(job.part_dir, shard), cut))
    cuts = range(0, len(recorder.prompts), args.prompts_per_slice)
    for number, start in enumerate(cuts):
        prompts = recorder.prompts[start : start + args.prompts_per_slice]
        files.append(write_prompts(prompts_file(job.part_dir, number), prompts))
    facts = RequestsFacts(
        kinds=tuple(sorted(asked)),
        num_requests=len(recorder.requests),
        num_shards=len(files) - len(cuts),
        longest=len(rows[0].token_ids) if rows else 0,
        num_tokens=sum(len(row.token_ids) for row in rows),
        num_prompts=len(recorder.prompts),
        num_slices=len(cuts),
        versions={name: str(task.VERSION) for name, task in loaded["tasks"].items()},
    )
    return UnitResult(facts, files)
