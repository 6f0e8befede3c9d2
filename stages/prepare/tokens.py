"""Sequences from documents: joined, cut to T tokens, and drawn by a seed."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from stages.contracts.errors import InputError

POOL_FACTOR = 16
"""Tokens in the pool that sequences are drawn from, for each token asked for. Also characters read of one document: so it takes
several to fill the pool, unless they are fewer."""

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]


def draw_sequences(
    documents: Iterable[Tokens], num_sequences: int, sequence_length: int, seed: int, source: str
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Token ids [num_sequences, sequence_length] drawn without replacement from the joined documents.

    Documents are taken until the pool holds POOL_FACTOR times what is asked for. Raises InputError when all of them hold
    fewer tokens than asked for; source: what they are, for the message.
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
