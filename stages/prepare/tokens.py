"""Makes sequences from documents: joins the documents, cuts them into sequences of T tokens, and draws some by a seed."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from tempfile import TemporaryFile

import numpy as np

from stages.contracts.arrow import Array
from stages.contracts.errors import InputError

POOL_FACTOR = 16
"""The pool, from which sequences are drawn, has this many times the requested tokens. At most as many characters are read of
one document as the pool has tokens, so that several documents are needed to fill it."""
MAX_POOL = 1 << 26
"""Largest pool in tokens, 512 MiB in a temporary file, unless more are requested: then the pool is what is requested."""

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Drawn:
    """Sequences that were drawn. windows_WT: all that there were, which need not fit in memory. chosen_S: which were drawn."""

    windows_WT: Array
    chosen_S: Tokens

    def __len__(self) -> int:
        return len(self.chosen_S)

    def part(self, start: int, stop: int) -> Array:
        """Token ids [at most stop - start, T] of some of the sequences, of the integer type in which they were given."""
        return np.array(self.windows_WT[self.chosen_S[start:stop]])


def pool_tokens(num_wanted: int) -> int:
    """Tokens of the pool from which num_wanted tokens are drawn."""
    return max(num_wanted, min(POOL_FACTOR * num_wanted, MAX_POOL))


def draw_sequences(
    documents: Iterable[Tokens], num_sequences: int, sequence_length: int, seed: int, source: str, *, is_even: bool = False
) -> Drawn:
    """Sequences of sequence_length tokens drawn without replacement from the joined documents.

    is_even: draw the same number of sequences from each document, or one from each of num_sequences documents where there are
    more. A sequence counts for the document in which it begins.

    Documents are read until the pool is full. Raises InputError when all documents together have fewer than the requested
    tokens. source: name of the documents, for the message.
    """
    wanted = num_sequences * sequence_length
    file, ends = TemporaryFile(prefix="hcsmoe-pool-"), list[int]()  # noqa: SIM115  # closed with the array that maps it
    num_pooled = 0
    for document in documents:
        file.write(np.ascontiguousarray(document, dtype=np.int64).data)
        num_pooled += len(document)
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
    return Drawn(windows_WT, np.sort(chosen_S))


def _evenly(document_W: Tokens, count: int, chance: np.random.Generator) -> Tokens:
    """Windows by turns from all documents, in random order. document_W: the document of each window."""
    shuffled_W = chance.permutation(len(document_W))
    turn_W = np.empty(len(document_W), dtype=np.int64)
    seen: Counter[int] = Counter()
    for window in shuffled_W:
        turn_W[window] = seen[document_W[window]]
        seen[document_W[window]] += 1
    return shuffled_W[np.argsort(turn_W[shuffled_W], kind="stable")[:count]]
