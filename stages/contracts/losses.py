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
    """Negative log-likelihood of each sequence in nats, summed over its predictions, and the number of its predictions."""

    negative_log_likelihood: Sequence[float]
    num_predictions: Sequence[int]


def write_losses(path: Path, losses: Losses) -> WrittenFile:
    """Write the losses of one token shard."""
    return write_table(path, {name: getattr(losses, name) for name in _SCHEMA.names}, _SCHEMA)


def read_losses(path: Path) -> Losses:
    """Read the losses of one token shard."""
    table = read_table(path)
    return Losses(**{name: table[name].to_pylist() for name in _SCHEMA.names})
