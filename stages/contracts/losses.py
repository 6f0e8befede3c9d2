"""Losses of a token shard's sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from stages.contracts.arrow import read_table, write_table
from stages.io.files import WrittenFile

_SCHEMA = pa.schema(
    [
        pa.field("negative_log_likelihood", pa.float64(), False),
        pa.field("num_predictions", pa.int64(), False),
    ],
    metadata={"table": "one sequence a row", "negative_log_likelihood": "nats, summed over the sequence's predictions"},
)


@dataclass(frozen=True)
class Losses:
    """For each sequence: negative log-likelihood in nats, summed over its predictions, and the number of predictions."""

    negative_log_likelihoods: Sequence[float]
    num_predictions: Sequence[int]


def write_losses(path: Path, losses: Losses) -> WrittenFile:
    """Write one row per sequence."""
    columns = {
        "negative_log_likelihood": losses.negative_log_likelihoods,
        "num_predictions": losses.num_predictions,
    }
    return write_table(path, columns, _SCHEMA)


def read_losses(path: Path) -> Losses:
    """Read a file of `write_losses`."""
    table = read_table(path)
    return Losses(table["negative_log_likelihood"].to_pylist(), table["num_predictions"].to_pylist())
