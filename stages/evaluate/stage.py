"""Units of evaluate: a token shard through a layer shard (the last one takes the losses), and the score of a model."""

import math

from torch import Tensor
from torch.nn import functional

from stages.contracts.losses import Losses, read_losses, write_losses
from stages.contracts.paths import SCORES_FILE, hidden_file, losses_file, tokens_file
from stages.contracts.units import Job, UnitResult
from stages.io.files import write_json
from stages.model.layer_shard import LayerShard
from stages.model.stream import enter, leave, micro_batches, read_token_ids, run_layers


def sequence_losses(logits_BTV: Tensor, token_ids_BT: Tensor) -> Tensor:
    """Next-token negative log-likelihood of each sequence in nats, float64 [B], summed over its T - 1 predictions."""
    predicted = logits_BTV[:, :-1].float().flatten(0, 1)
    actual = token_ids_BT[:, 1:].to(predicted.device)
    losses = functional.cross_entropy(predicted, actual.flatten(), reduction="none")
    return losses.double().view(actual.shape).sum(1).cpu()


def evaluate_unit(job: Job) -> UnitResult:
    """Send a token shard through the held layer shard; after the last layer, write its losses.

    args: tokens_dir (relative to the run directory), shard, micro_batch (sequences), is_last.
    """
    args = job.args
    held: LayerShard = job.held
    token_ids_ST = read_token_ids(job.run_dir / args["tokens_dir"] / tokens_file(args["shard"]))
    source = hidden_file(job.stage_dir, held.first, args["shard"]) if held.first else None
    hidden = run_layers(held, enter(held, token_ids_ST, source, args["micro_batch"]))
    if not args["is_last"]:
        return UnitResult(transient=(leave(hidden_file(job.stage_dir, held.stop, args["shard"]), hidden),))
    losses: list[float] = []
    for hidden_BTD, ids in zip(hidden, micro_batches(token_ids_ST, args["micro_batch"]), strict=True):
        losses.extend(sequence_losses(held.logits(hidden_BTD), ids).tolist())
    record = Losses(losses, [token_ids_ST.shape[1] - 1] * len(losses))
    return UnitResult((write_losses(losses_file(job.stage_dir, args["shard"]), record),))


def score_unit(job: Job) -> UnitResult:
    """Write `scores.json`: perplexity over all sequences, summed in the order of the token shards. args: num_shards.

    A loss that is not finite, and a perplexity that is larger than any float, are null: JSON has no number for them.
    """
    total, num_predictions = 0.0, 0
    for shard in range(job.args["num_shards"]):
        record = read_losses(losses_file(job.stage_dir, shard))
        losses = record.negative_log_likelihood
        total += math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
        num_predictions += sum(record.num_predictions)
    loss = total / num_predictions
    scores = {
        "perplexity": _exp(loss),
        "loss": loss if math.isfinite(loss) else None,
        "num_predictions": num_predictions,
    }
    return UnitResult((write_json(job.stage_dir / SCORES_FILE, scores),), facts=scores)


def _exp(loss: float) -> float | None:
    try:
        return math.exp(loss) if math.isfinite(loss) else None
    except OverflowError:
        return None
