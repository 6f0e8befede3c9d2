"""Units of evaluate: pass a token shard through a layer shard (the last shard computes losses), and score a model."""

import math
from collections.abc import Sequence

import torch
from pydantic import JsonValue
from torch import Tensor
from torch.nn import functional

from stages.contracts.losses import Losses, read_losses, write_losses
from stages.contracts.paths import SCORES_FILE, losses_file, tokens_file
from stages.contracts.units import HeldJob, Job, NoFacts, UnitResult
from stages.contracts.windows import NO_TOKEN, scored
from stages.evaluate.spec import EvaluateArgs, ScoreArgs, Scores
from stages.io.files import write_json
from stages.model.layer_shard import LayerShard
from stages.model.stream import Stream, hidden_files, pass_through, read_token_ids


def sequence_losses(logits_BTV: Tensor, token_ids_BT: Tensor, is_scored_BT: Tensor) -> Tensor:
    """Next-token negative log-likelihood of each sequence in nats, float64 [B], summed over its predicted tokens.
    is_scored_BT: which tokens are predicted, bool."""
    predicted = logits_BTV[:, :-1].float().flatten(0, 1)
    actual = token_ids_BT[:, 1:].to(predicted.device)
    losses = functional.cross_entropy(predicted, actual.flatten(), ignore_index=NO_TOKEN, reduction="none")
    return losses.double().view(actual.shape).where(is_scored_BT[:, 1:].to(losses.device), 0.0).sum(1).cpu()


def evaluate_unit(job: HeldJob[EvaluateArgs, LayerShard]) -> UnitResult[NoFacts]:
    """Pass a token shard through the held layer shard. After the last layer, write its losses."""
    args = job.args.stream
    losses: list[float] = []
    num_predictions: list[int] = []
    token_ids_ST = read_token_ids(job.run_dir / args.tokens_dir / tokens_file(args.shard))
    is_scored_ST = torch.from_numpy(scored(token_ids_ST.numpy(), job.args.first_sequence, job.args.stride))

    def see_logits(logits_BTV: Tensor, token_ids_BT: Tensor) -> None:
        is_scored_BT = is_scored_ST[len(losses) : len(losses) + len(token_ids_BT)]
        losses.extend(sequence_losses(logits_BTV, token_ids_BT, is_scored_BT).tolist())
        num_predictions.extend(is_scored_BT.sum(1).tolist())

    reads, writes = hidden_files(job.part_dir, args, job.held)
    stream = Stream(reads, writes, see_logits=see_logits if args.is_last else None)
    passed = pass_through(job.held, token_ids_ST, args.micro_batch, {"model": stream})
    if not args.is_last:
        return UnitResult(NoFacts(), transient=passed.files)
    return UnitResult(NoFacts(), (write_losses(losses_file(job.part_dir, args.shard), Losses(losses, num_predictions)),))


def score_unit(job: Job[ScoreArgs]) -> UnitResult[Scores]:
    """Write `scores.json`: perplexity over all sequences, summed in the order of the token shards; with domains also that of
    each, and their geometric mean.

    A loss that is not finite and a perplexity that overflows a float are written as null, because JSON has no number for them.
    """
    sums = {
        domain.name: [_sum(read_losses(losses_file(job.part_dir, shard))) for shard in range(domain.first, domain.stop)]
        for domain in job.args.domains
    }
    num_bytes = job.args.num_bytes
    in_all = sum(num_bytes.values()) if num_bytes.keys() == sums.keys() else None
    scores = _scores([one for some in sums.values() for one in some], in_all)
    values: dict[str, JsonValue] = dict(vars(scores))
    if "" not in sums:
        by_domain = {name: _scores(some, num_bytes.get(name)) for name, some in sums.items()}
        losses = [math.nan if one.loss is None else one.loss for one in by_domain.values()]
        values["domains"] = {name: dict(vars(one)) for name, one in by_domain.items()}
        values["macro_perplexity"] = _exp(math.fsum(losses) / len(losses))
    return UnitResult(scores, (write_json(job.part_dir / SCORES_FILE, values),))


def _sum(losses: Losses) -> tuple[float, int]:
    """Summed losses and predictions of a token shard."""
    values = losses.negative_log_likelihoods
    return math.fsum(values) if all(map(math.isfinite, values)) else math.nan, sum(losses.num_predictions)


def _scores(sums: Sequence[tuple[float, int]], num_bytes: int | None) -> Scores:
    total, num_predictions = sum(loss for loss, _ in sums), sum(count for _, count in sums)
    loss = total / num_predictions
    bits_per_byte = total / math.log(2) / num_bytes if num_bytes and math.isfinite(loss) else None
    return Scores(_exp(loss), loss if math.isfinite(loss) else None, num_predictions, bits_per_byte)


def _exp(loss: float) -> float | None:
    try:
        return math.exp(loss) if math.isfinite(loss) else None
    except OverflowError:
        return None
