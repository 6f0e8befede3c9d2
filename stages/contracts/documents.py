"""Fingerprints of the documents that a text's sequences come from, and how many documents two texts share.

A fingerprint is a sample of hashes of a document's token windows, so that a document is found again whatever stands before it,
if it was cut, or if a few of its words were changed.
"""

from collections.abc import Iterable, Sequence
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
    [pa.field("windows", pa.large_list(pa.uint64()), False)],
    metadata={"table": "one document a row", "windows": f"hashes of some of its windows of {WINDOW_TOKENS} tokens"},
)


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
    found = [fingerprint(ids_T) for ids_T in documents]
    offsets = np.cumsum([0, *map(len, found)])
    values = np.concatenate([np.empty(0, np.uint64), *found])
    return write_table(path, {"windows": pa.LargeListArray.from_arrays(offsets, values)}, _SCHEMA)


def read_documents(path: Path) -> list[Array]:
    """Fingerprints of a file of `write_documents`."""
    lists = read_table(path)["windows"].combine_chunks()
    return np.split(lists.flatten().to_numpy(), lists.offsets.to_numpy()[1:-1])


def num_shared(documents: Sequence[Array], others: Sequence[Array]) -> int:
    """Number of documents of which at least SHARED_SHARE of the kept windows are windows of the others."""
    known = np.unique(np.concatenate([np.empty(0, np.uint64), *others]))
    return sum(bool(np.isin(windows, known).mean() >= SHARED_SHARE) for windows in documents if len(windows))
