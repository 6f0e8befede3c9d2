"""Units for tasks of lm-evaluation-harness: answer requests in layer shards, and compute scores from answers.

Dimensions: S rows, B rows of a micro-batch, T tokens, D hidden size, N scored positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.contracts.paths import RESULTS_FILE
from stages.contracts.prompts import Prompt, prompts_file, read_prompts, read_texts, texts_file
from stages.contracts.requests import (
    Request,
    Row,
    answers_file,
    padded,
    read_answers,
    read_requests,
    requests_file,
    write_answers,
)
from stages.contracts.units import HeldJob, Job, NoFacts, UnitResult
from stages.evaluate.tasks import AnswerArgs, TaskFacts, TaskScoreArgs
from stages.harness.attempts import attempted
from stages.io.files import write_bytes
from stages.model.layer_shard import LayerShard
from stages.model.stream import Stream, hidden_files, pass_through

_POSITIONS = 256
"""Positions whose logits are computed at once: they bound memory where the vocabulary is large."""


def answer_unit(job: HeldJob[AnswerArgs, LayerShard]) -> UnitResult[NoFacts]:
    """Pass a shard of requests through the held layer shard. After the last layer, write the answers."""
    args = job.args.stream
    rows = read_requests(requests_file(job.run_dir / args.tokens_dir, args.shard))
    token_ids_ST = torch.from_numpy(padded(rows))
    micro_batch = max(1, job.args.tokens_per_micro_batch // token_ids_ST.shape[1])
    stream = Stream(*hidden_files(job.part_dir, args, job.held))
    passed = pass_through(job.held, token_ids_ST, micro_batch, {"model": stream})
    if not args.is_last:
        return UnitResult(NoFacts(), transient=passed.files)
    hidden = [hidden_TD for hidden_BTD in passed.hidden["model"] for hidden_TD in hidden_BTD]
    answers = list(row_answers(job.held, rows, hidden))
    return UnitResult(NoFacts(), (write_answers(answers_file(job.part_dir, args.shard), answers),))


def row_answers(held: LayerShard, rows: Sequence[Row], hidden: Sequence[Tensor]) -> Iterator[tuple[float, bool]]:
    """Answers to the requests of all rows, in order: the log-likelihood of the scored tokens in nats, and whether each of them
    is the likeliest. hidden: states [T, D] of each row after the last layer."""
    # the last hidden state of a row predicts the token behind it
    counts = [max(row.nums_scored) for row in rows]
    states_ND = torch.cat(
        [
            hidden_TD[len(row.token_ids) - count : len(row.token_ids)]
            for row, hidden_TD, count in zip(rows, hidden, counts, strict=True)
        ]
    )
    wanted = [_wanted(row, count) for row, count in zip(rows, counts, strict=True)]
    found = _log_probabilities(held, states_ND, [ids for one in wanted for ids in one])
    start = 0
    for row, count in zip(rows, counts, strict=True):
        for number, num_scored in enumerate(row.nums_scored):
            scored = found[start + count - num_scored : start + count]
            # all but the last scored tokens are the row's own, which stand first among the wanted ones
            values = [pairs[0] for pairs in scored[:-1]] + [scored[-1][number]]
            yield sum(value for value, _ in values), all(is_likeliest for _, is_likeliest in values)
        start += count


def _wanted(row: Row, count: int) -> list[tuple[int, ...]]:
    """Tokens whose log-probabilities are needed at each of a row's last positions: the next one, and at the last position the
    last token of every request."""
    inside = [(token,) for token in row.token_ids[len(row.token_ids) - count + 1 :]]
    return [*inside, row.last_ids]


def _log_probabilities(held: LayerShard, states_ND: Tensor, wanted: Sequence[Sequence[int]]) -> list[list[tuple[float, bool]]]:
    """For each position, the log-probability of each wanted token, and whether it is the likeliest one."""
    found: list[list[tuple[float, bool]]] = []
    for start in range(0, len(states_ND), _POSITIONS):
        logits_NV = held.logits(states_ND[None, start : start + _POSITIONS])[0].float()
        likeliest_N = logits_NV.argmax(-1).tolist()
        totals_N = logits_NV.logsumexp(-1)
        for position, ids in enumerate(wanted[start : start + _POSITIONS]):
            values = (logits_NV[position, list(ids)] - totals_N[position]).double().tolist()
            found.append([(value, token == likeliest_N[position]) for value, token in zip(values, ids, strict=True)])
    return found


def score_task_unit(job: Job[TaskScoreArgs]) -> UnitResult[TaskFacts]:
    """Give the stored answers to the harness and write its results."""
    return attempted(job.part_dir, lambda: _score(job), TaskFacts)


def _score(job: Job[TaskScoreArgs]) -> UnitResult[TaskFacts]:
    from stages.harness.models import Replay
    from stages.harness.tasks import quiet, results_of, results_text

    args = job.args
    shards, slices = range(args.num_shards), range(args.num_slices)
    expected = [answers_file(job.part_dir, number) for number in shards] + [
        texts_file(job.part_dir, number) for number in slices
    ]
    lacking = [path.name for path in expected if not path.exists()]
    if lacking:
        return UnitResult(
            TaskFacts(f"{len(lacking)} of {len(expected)} files of answers are missing: {', '.join(lacking)}"[:400])
        )
    requests_dir = job.run_dir / args.requests_dir
    answers: dict[Request, tuple[float, bool]] = {}
    for shard in shards:
        asked = [request for row in read_requests(requests_file(requests_dir, shard)) for request in row.requests]
        answers |= dict(zip(asked, read_answers(answers_file(job.part_dir, shard)), strict=True))
    texts: dict[Prompt, list[str]] = {}
    for number in slices:
        prompts = read_prompts(prompts_file(requests_dir, number))
        for prompt, text in zip(prompts, read_texts(texts_file(job.part_dir, number)), strict=True):
            texts.setdefault(prompt, []).append(text)
    with quiet():
        model = Replay(Checkpoint(args.model), args.task.trust_remote_code, args.task.max_length, answers, texts)
        kind = "vllm" if args.backend == "vllm" else "hf"
        text = results_text(results_of(model, args.task, args.name, kind))
    return UnitResult(TaskFacts(), (write_bytes(job.part_dir / RESULTS_FILE, text.encode()),))
