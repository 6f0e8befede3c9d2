"""Makes sequences from documents: joins the documents, cuts them into sequences of T tokens, and draws some by a seed.

Dimensions: S sequences, T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from stages.contracts.documents import Document
from stages.contracts.errors import InputError
from stages.contracts.windows import NO_TOKEN, scored

POOL_FACTOR = 16
"""The pool, from which sequences are drawn, has this many times the requested tokens. At most as many characters are read of
one document as the pool has tokens, so that several documents are needed to fill it."""

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Sequences:
    """token_ids_ST: sequences of a text. documents: token ids of each document that a sequence contains a token of. num_bytes:
    bytes of UTF-8 that the predicted tokens stand for; None if not known."""

    token_ids_ST: "np.ndarray[Any, np.dtype[Any]]"
    documents: Sequence[Tokens]
    num_bytes: int | None


def draw_sequences(
    documents: Iterable[Document], num_sequences: int, sequence_length: int, seed: int, source: str
) -> Sequences:
    """num_sequences sequences of sequence_length tokens, drawn without replacement from the joined documents.

    Documents are read until the pool has POOL_FACTOR times the requested tokens. Raises InputError when all documents together
    have fewer than the requested tokens. source: name of the documents, for the message.
    """
    pieces: list[Document] = []
    num_pooled, wanted = 0, num_sequences * sequence_length
    for document in documents:
        pieces.append(document)
        num_pooled += len(document.token_ids_T)
        if num_pooled >= POOL_FACTOR * wanted:
            break
    if num_pooled < wanted:
        raise InputError(
            f"{source} holds {num_pooled:,} tokens in {len(pieces):,} documents (at most {POOL_FACTOR * wanted:,} "
            f"characters of each are read) but num_sequences {num_sequences} x sequence_length {sequence_length} "
            f"= {wanted:,}; give more text or lower one of them"
        )
    num_windows = num_pooled // sequence_length
    chosen = np.sort(np.random.default_rng(seed).choice(num_windows, size=num_sequences, replace=False))

    def cut(values: Iterable[Tokens]) -> "np.ndarray[Any, np.dtype[np.int64]]":
        windows = np.concatenate(list(values))[: num_windows * sequence_length].reshape(num_windows, sequence_length)
        return windows[chosen]

    token_ids_ST = cut(piece.token_ids_T for piece in pieces)
    bytes_of = [piece.num_bytes_T for piece in pieces if piece.num_bytes_T is not None]
    num_bytes = int(cut(bytes_of)[scored(token_ids_ST, 0, None)].sum()) if len(bytes_of) == len(pieces) else None
    starts = [0, *accumulate(len(piece.token_ids_T) for piece in pieces)]
    first, last = chosen * sequence_length, (chosen + 1) * sequence_length
    used = [
        piece.token_ids_T
        for piece, (start, stop) in zip(pieces, pairwise(starts), strict=True)
        if np.any((first < stop) & (last > start))
    ]
    return Sequences(token_ids_ST, used, num_bytes)


def slide(document: Document, num_sequences: int, sequence_length: int, stride: int, source: str) -> Sequences:
    """The first num_sequences sequences that begin `stride` tokens apart. Behind the end of the text, the last one is filled
    with NO_TOKEN. Raises InputError, with the number of sequences that the text gives, when there are fewer."""
    ids_T = document.token_ids_T
    num_windows = 1 + max(0, -(-(len(ids_T) - sequence_length) // stride)) if len(ids_T) > 1 else 0
    if num_windows < num_sequences:
        raise InputError(
            f"{source} gives {num_windows} sequences of {sequence_length} tokens that begin {stride} tokens apart (perplexity."
            f"stride), from {len(ids_T):,} tokens, but num_sequences is {num_sequences}; use at most {num_windows}"
        )
    positions_ST = stride * np.arange(num_sequences)[:, None] + np.arange(sequence_length)
    is_there_ST = positions_ST < len(ids_T)
    positions_ST = np.minimum(positions_ST, len(ids_T) - 1)
    token_ids_ST = np.where(is_there_ST, ids_T[positions_ST], NO_TOKEN)
    num_bytes = None
    if document.num_bytes_T is not None:
        num_bytes = int(document.num_bytes_T[positions_ST][scored(token_ids_ST, 0, stride)].sum())
    return Sequences(token_ids_ST, [row[row != NO_TOKEN] for row in token_ids_ST], num_bytes)
