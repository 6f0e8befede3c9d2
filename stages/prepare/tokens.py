"""Makes sequences from documents: joins the documents, cuts them into sequences of T tokens, and draws some by a seed."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from stages.contracts.errors import InputError

POOL_FACTOR = 16
"""The pool, from which sequences are drawn, has this many times the requested tokens. At most as many characters are read of
one document as the pool has tokens, so that several documents are needed to fill it."""

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]


def draw_sequences(
    documents: Iterable[Tokens], num_sequences: int, sequence_length: int, seed: int, source: str, *, is_even: bool = False
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Token ids [num_sequences, sequence_length] drawn without replacement from the joined documents.

    is_even: draw the same number of sequences from each document, or one from each of num_sequences documents where there are
    more. A sequence counts for the document in which it begins.

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
    chance = np.random.default_rng(seed)
    if is_even:
        ends = np.cumsum([len(piece) for piece in pieces])
        chosen = _evenly(np.searchsorted(ends, np.arange(num_windows) * sequence_length, side="right"), num_sequences, chance)
    else:
        chosen = chance.choice(num_windows, size=num_sequences, replace=False)
    return windows[np.sort(chosen)]


def _evenly(document_W: Tokens, count: int, chance: np.random.Generator) -> Tokens:
    """Windows by turns from all documents, in random order. document_W: the document of each window."""
    shuffled_W = chance.permutation(len(document_W))
    turn_W = np.empty(len(document_W), dtype=np.int64)
    seen: Counter[int] = Counter()
    for window in shuffled_W:
        turn_W[window] = seen[document_W[window]]
        seen[document_W[window]] += 1
    return shuffled_W[np.argsort(turn_W[shuffled_W], kind="stable")[:count]]
