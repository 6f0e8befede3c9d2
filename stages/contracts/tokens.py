"""A token shard: token ids, one sequence per row.

Dimensions: S sequences, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, read_table, write_table
from stages.contracts.windows import NO_TOKEN
from stages.io.files import WrittenFile

_SCHEMA = pa.schema(
    [pa.field("token_ids", pa.list_(pa.int32()), False)],
    metadata={"table": "one sequence a row", "token_ids": "[T] ids of the model's vocabulary"},
)


@dataclass(frozen=True)
class UnpackedPlace:
    """Where a token shard stands in a text with padding, which is not counted. Only reading the text tells.

    first: tokens of the text before the shard. num_tokens: tokens of the text.
    """

    first: int
    num_tokens: int


def write_tokens(path: Path, token_ids_ST: Array, place: UnpackedPlace | None = None) -> WrittenFile:
    """Write token ids [S, T]. place: of the shard; None if documents are packed."""
    schema = _SCHEMA
    if place is not None:
        more = {"first_token": str(place.first), "tokens_of_text": str(place.num_tokens), "padding": str(NO_TOKEN)}
        schema = schema.with_metadata({**(schema.metadata or {}), **more})
    return write_table(path, {"token_ids": [row.tolist() for row in token_ids_ST]}, schema)


def read_tokens(path: Path) -> Array:
    """Token ids int64 [S, T]."""
    return np.array(read_table(path)["token_ids"].to_pylist(), dtype=np.int64)


def read_place(path: Path) -> UnpackedPlace | None:
    """Where the shard stands in a text with padding; None if documents are packed."""
    metadata = read_table(path).schema.metadata
    if b"first_token" not in metadata:
        return None
    return UnpackedPlace(int(metadata[b"first_token"]), int(metadata[b"tokens_of_text"]))
