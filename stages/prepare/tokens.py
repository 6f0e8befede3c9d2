"""Makes sequences from documents: joins the documents, cuts them into sequences of T tokens, and draws some by a seed."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from stages.contracts.errors import InputError

POOL_FACTOR = 16
"""The pool, from which sequences are drawn, has this many times the requested tokens. At most as many characters are read of
one document as the pool has tokens, so that several documents are needed to fill it."""

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]


def draw_sequences(
    documents: Iterable[Tokens], num_sequences: int, sequence_length: int, seed: int, source: str
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Token ids [num_sequences, sequence_length] drawn without replacement from the joined documents.

    Documents are read until the pool has POOL_FACTOR times the requested tokens. Raises InputError when all documents together
    have fewer than the requested tokens. source: name of the documents, for the message.
    """
    pieces: list[Tokens] = []
    num_pooled, wanted = 0, num_sequences * sequence_length
    for document in documents:
        pieces.append(document)
        num_pooled += len(document)
        if num_pooled >= POOL_FACTOR * wanted:
            break
    if num_pooled < wanted:
        raise InputError(
            f"{source} holds {num_pooled:,} tokens in {len(pieces):,} documents (at most {POOL_FACTOR * wanted:,} "
            f"characters of each are read) but num_sequences {num_sequences} x sequence_length {sequence_length} "
            f"= {wanted:,}; give more text or lower one of them"
        )
    num_windows = num_pooled // sequence_length
    windows = np.concatenate(pieces)[: num_windows * sequence_length].reshape(num_windows, sequence_length)
    chosen = np.random.default_rng(seed).choice(num_windows, size=num_sequences, replace=False)
    return windows[np.sort(chosen)]
