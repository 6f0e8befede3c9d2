"""Documents as tokens; fingerprints of those that a text's sequences come from, and how many of them two texts share.

A fingerprint is a sample of hashes of a document's token windows, so that a document is found again whatever stands before it,
if it was cut, or if a few of its words were changed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, read_table, write_table
from stages.io.files import WrittenFile

WINDOW_TOKENS = 32
"""Tokens of a window. A document with fewer is one window."""
_KEPT_OF = 8
"""One window in so many is kept, chosen by its hash: equal windows are kept in every text."""
SHARED_SHARE = 0.5
"""Share of a document's kept windows that the other text has, from which on the document counts as shared."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_SCHEMA = pa.schema(
    [pa.field("windows", pa.list_(pa.uint64()), False)],
    metadata={"table": "one document a row", "windows": f"hashes of some of its windows of {WINDOW_TOKENS} tokens"},
)


@dataclass(frozen=True)
class Document:
    """Tokens of a document. token_ids_T: int64. num_bytes_T: bytes of UTF-8 that each token adds to the text; None if the
    tokenizer does not tell."""

    token_ids_T: Array
    num_bytes_T: Array | None = None


def fingerprint(token_ids_T: Array) -> Array:
    """Hashes of kept windows, uint64, distinct and ascending; at least one if there is a token."""
    ids_T = np.asarray(token_ids_T).astype(np.uint64)
    if not len(ids_T):
        return np.empty(0, np.uint64)
    num_tokens = min(WINDOW_TOKENS, len(ids_T))
    hashes_W = np.full(len(ids_T) - num_tokens + 1, num_tokens, np.uint64)
    for offset in range(num_tokens):
        hashes_W = _mixed(hashes_W * _FACTOR + ids_T[offset : offset + len(hashes_W)])
    found = np.unique(hashes_W)
    kept = found[found % np.uint64(_KEPT_OF) == 0]
    return kept if len(kept) else found[:1]


def _mixed(values: Array) -> Array:
    """Spread every bit over the lower half, which alone decides what is kept."""
    mixed: Array = values ^ (values >> np.uint64(29))
    return mixed


def write_documents(path: Path, documents: Iterable[Array]) -> WrittenFile:
    """Write the fingerprints of documents. documents: token ids [T] of each."""
    return write_table(path, {"windows": [fingerprint(ids_T).tolist() for ids_T in documents]}, _SCHEMA)


def read_documents(path: Path) -> list[Sequence[int]]:
    """Fingerprints of a file of `write_documents`."""
    return read_table(path)["windows"].to_pylist()  # type: ignore[no-any-return]


def num_shared(documents: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> int:
    """Number of documents of which at least SHARED_SHARE of the kept windows are windows of the others."""
    known = {window for other in others for window in other}
    return sum(sum(window in known for window in windows) >= SHARED_SHARE * len(windows) for windows in documents if windows)
