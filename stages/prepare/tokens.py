"""Makes sequences from documents: joins the documents, cuts them into sequences of T tokens, and draws some by a seed."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from tempfile import TemporaryFile

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.windows import NO_TOKEN, scored

POOL_FACTOR = 16
"""The pool, from which sequences are drawn, has this many times the requested tokens. At most as many characters are read of
one document as the pool has tokens, so that several documents are needed to fill it."""
MAX_POOL = 1 << 26
"""Largest pool in tokens, 512 MiB in a temporary file, unless more are requested: then the pool is what is requested."""

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Encoded:
    """token_ids_T: of a document. num_bytes_T: bytes of UTF-8 that each token adds to the text; None if not known."""

    token_ids_T: Tokens
    num_bytes_T: Tokens | None = None


@dataclass(frozen=True)
class Drawn:
    """Sequences that were drawn. windows_WT: all that there were, which need not fit in memory. chosen_S: which were drawn.
    ends: number of tokens up to the end of each document; empty if each sequence is a document. num_bytes: bytes of UTF-8 that
    the predicted tokens stand for; None if not known."""

    windows_WT: Array
    chosen_S: Tokens
    ends: Sequence[int] = ()
    num_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.chosen_S)

    def part(self, start: int, stop: int) -> Array:
        """Token ids [at most stop - start, T] of some of the sequences, of the integer type in which they were given."""
        return np.array(self.windows_WT[self.chosen_S[start:stop]])

    def documents(self) -> Iterator[Array]:
        """Token ids of each document that a drawn sequence contains a token of, as far as whole sequences reach."""
        if not len(self.ends):
            for sequence in self.chosen_S:
                row = self.windows_WT[sequence]
                yield row[row != NO_TOKEN]
            return
        length = self.windows_WT.shape[1]
        firsts = np.searchsorted(self.ends, self.chosen_S * length, side="right")
        lasts = np.searchsorted(self.ends, (self.chosen_S + 1) * length - 1, side="right")
        flat = self.windows_WT.reshape(-1)
        for number in sorted({number for pair in zip(firsts, lasts, strict=True) for number in range(pair[0], pair[1] + 1)}):
            yield flat[self.ends[number - 1] if number else 0 : self.ends[number]]


def pool_tokens(num_wanted: int) -> int:
    """Tokens of the pool from which num_wanted tokens are drawn."""
    return max(num_wanted, min(POOL_FACTOR * num_wanted, MAX_POOL))


def draw_documents(documents: Iterable[Encoded], num_sequences: int, sequence_length: int, source: str) -> Drawn:
    """The first num_sequences documents, one a sequence, cut at sequence_length or filled with NO_TOKEN.

    documents: in an order that a seed has decided. Raises InputError for too few of them, and for one of fewer than two tokens,
    which predicts nothing. source: name of the documents, for the message.
    """
    file = TemporaryFile(prefix="hcsmoe-pool-")  # noqa: SIM115  # closed with the array that maps it
    num_drawn, num_bytes, has_bytes = 0, 0, True
    for document in islice(documents, num_sequences):
        ids_T = document.token_ids_T[:sequence_length]
        if len(ids_T) < 2:
            raise InputError(
                f"{source} has a document of {len(ids_T)} tokens, but with packing false each needs two; take it out, or set "
                "packing to true"
            )
        file.write(np.pad(ids_T, (0, sequence_length - len(ids_T)), constant_values=NO_TOKEN).astype(np.int64).data)
        num_drawn += 1
        has_bytes &= document.num_bytes_T is not None
        if document.num_bytes_T is not None:
            num_bytes += int(document.num_bytes_T[1:sequence_length].sum())  # the first token is not predicted
    if num_drawn < num_sequences:
        raise InputError(
            f"{source} holds {num_drawn:,} documents but num_sequences is {num_sequences:,} and packing is false; give more "
            "text, lower num_sequences, or set packing to true"
        )
    file.flush()
    windows_WT = np.memmap(file, np.int64, "r", shape=(num_sequences, sequence_length))
    return Drawn(windows_WT, np.arange(num_sequences), num_bytes=num_bytes if has_bytes else None)


def draw_sequences(
    documents: Iterable[Encoded], num_sequences: int, sequence_length: int, seed: int, source: str, *, is_even: bool = False
) -> Drawn:
    """Sequences of sequence_length tokens drawn without replacement from the joined documents.

    is_even: draw the same number of sequences from each document, or one from each of num_sequences documents where there are
    more. A sequence counts for the document in which it begins.

    Documents are read until the pool is full. Raises InputError when all documents together have fewer than the requested
    tokens. source: name of the documents, for the message.
    """
    wanted = num_sequences * sequence_length
    file, ends = TemporaryFile(prefix="hcsmoe-pool-"), list[int]()  # noqa: SIM115  # closed with the array that maps it
    bytes_file = TemporaryFile(prefix="hcsmoe-pool-")  # noqa: SIM115
    num_pooled, has_bytes = 0, True
    for document in documents:
        file.write(np.ascontiguousarray(document.token_ids_T, dtype=np.int64).data)
        has_bytes &= document.num_bytes_T is not None
        if document.num_bytes_T is not None:
            bytes_file.write(np.ascontiguousarray(document.num_bytes_T, dtype=np.int64).data)
        num_pooled += len(document.token_ids_T)
        ends.append(num_pooled)
        if num_pooled >= pool_tokens(wanted):
            break
    if num_pooled < wanted:
        raise InputError(
            f"{source} holds {num_pooled:,} tokens in {len(ends):,} documents (at most {pool_tokens(wanted):,} "
            f"characters of each are read) but num_sequences {num_sequences} x sequence_length {sequence_length} "
            f"= {wanted:,}; give more text or lower one of them"
        )
    file.flush()
    num_windows = num_pooled // sequence_length
    windows_WT = np.memmap(file, np.int64, "r", shape=(num_windows, sequence_length))
    chance = np.random.default_rng(seed)
    if is_even:
        document_W = np.searchsorted(ends, np.arange(num_windows) * sequence_length, side="right")
        chosen_S = _evenly(document_W, num_sequences, chance)
    else:
        chosen_S = chance.choice(num_windows, size=num_sequences, replace=False)
    chosen_S.sort()
    num_bytes = None
    if has_bytes:
        bytes_file.flush()
        bytes_WT = np.memmap(bytes_file, np.int64, "r", shape=(num_windows, sequence_length))
        num_bytes = sum(int(bytes_WT[window, 1:].sum()) for window in chosen_S)  # the first token is not predicted
    return Drawn(windows_WT, chosen_S, ends, num_bytes)


def slide(document: Encoded, num_sequences: int, sequence_length: int, stride: int, source: str) -> Drawn:
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
    return Drawn(token_ids_ST, np.arange(num_sequences), num_bytes=num_bytes)


def _evenly(document_W: Tokens, count: int, chance: np.random.Generator) -> Tokens:
    """Windows by turns from all documents, in random order. document_W: the document of each window."""
    shuffled_W = chance.permutation(len(document_W))
    turn_W = np.empty(len(document_W), dtype=np.int64)
    seen: Counter[int] = Counter()
    for window in shuffled_W:
        turn_W[window] = seen[document_W[window]]
        seen[document_W[window]] += 1
    return shuffled_W[np.argsort(turn_W[shuffled_W], kind="stable")[:count]]
