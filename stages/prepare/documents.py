"""Documents of a text in a seeded order for all kinds of files: with bounded memory, no copy on disk and no seeking.

A first pass counts the documents. A seeded permutation of their numbers then gives the order. Each further pass over the files
picks the next batch of documents in that order. Passes are necessary because compressed files cannot be sought. The result is
the same on any machine.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from stages.io.texts import kind_of
from stages.prepare.lines import JsonReader, TextReader
from stages.prepare.reading import Document, Reader, failing
from stages.prepare.rows import ParquetReader

MAX_ORDERED = 1 << 24
"""Maximum number of documents in the permutation, which then takes 128 MiB.
Of more documents, this many are used, evenly spaced."""
_CHARACTERS_A_TOKEN = 6
"""More characters per token than in most texts with most tokenizers, so that one pass usually picks enough documents."""
_PASS_CHARACTERS = 1 << 28
"""About as many characters are picked in one pass over the files. They are held in memory."""
_FEWEST_CHARACTERS_A_TOKEN = 2
"""Fewer than in most texts, so that as many documents as are wanted usually find room."""

_READERS: dict[str | None, type[Reader]] = {"json": JsonReader, "text": TextReader, "parquet": ParquetReader}


def read_documents(
    files: Sequence[Path],
    text_field: str,
    seed: int,
    max_characters: int,
    place: str,
    *,
    is_chat: bool = False,
    num_even: int = 1,
) -> Iterator[Document]:
    """Documents of files of one kind in a seeded order. Texts longer than max_characters are cut.

    num_even: documents that must find room, if there are as many, where a single one of max_characters would fill it with two
    characters a token. Longer texts are then cut shorter, to a piece from a seeded place within.

    Raises InputError for a damaged file, one whose text_field is not text, and for rows without a conversation if is_chat.
    """
    readers = [_READERS[kind_of(path.name)](path, text_field, place, is_chat) for path in files]
    sizes = []
    for reader in readers:
        with failing(reader.path, place):
            sizes.append(reader.measure())
    starts = [0, *accumulate(size.num_documents for size in sizes)]
    order_D = seeded_order(starts[-1], seed)
    is_even = min(num_even, starts[-1]) > 1
    room = max_characters if not is_even else max(1, _FEWEST_CHARACTERS_A_TOKEN * max_characters // min(num_even, starts[-1]))

    def cut(number: int, text: str) -> str:
        last = len(text) - room
        begin = int(np.random.default_rng([seed, number]).integers(last + 1)) if is_even and last > 0 else 0
        return text[begin : begin + room]

    mean_characters = min(room, max(1, sum(size.num_bytes for size in sizes) // max(1, starts[-1])))
    num_wanted, begin = 1 + min(_CHARACTERS_A_TOKEN * max_characters, _PASS_CHARACTERS) // mean_characters, 0
    while begin < len(order_D):
        wanted = order_D[begin : begin + num_wanted].tolist()
        found = _pick(readers, starts, sorted(wanted), cut)
        yield from (found.pop(number) for number in wanted)
        begin += len(wanted)
        num_wanted = min(2 * num_wanted, 1 + _PASS_CHARACTERS // mean_characters)


def read_in_order(files: Sequence[Path], text_field: str, max_characters: int, place: str) -> Iterator[str]:
    """Documents of files of one kind as they stand there, until they have max_characters in all; the last may be cut.

    Raises InputError for a damaged file, or one whose text_field is not text.
    """
    left = max_characters
    for path in files:
        reader = _READERS[kind_of(path.name)](path, text_field, place, False)
        with failing(path, place):
            for _, text in reader.read(range(reader.measure().num_documents)):
                assert isinstance(text, str)
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return


def seeded_order(num_documents: int, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Numbers of the documents in reading order, int64 [at most MAX_ORDERED]."""
    num_ordered = min(num_documents, MAX_ORDERED)
    order_D: np.ndarray[tuple[int], np.dtype[np.int64]] = np.random.default_rng(seed).permutation(num_ordered)
    return order_D if num_ordered == num_documents else order_D * num_documents // num_ordered


def _pick(
    readers: Sequence[Reader], starts: Sequence[int], wanted: Sequence[int], cut: Callable[[int, str], str]
) -> dict[int, Document]:
    """Documents by number. wanted: sorted numbers. starts: number of each file's first document, and the total. cut: given a
    number and a text, what is used of it."""
    found: dict[int, Document] = {}
    for reader, (start, stop) in zip(readers, pairwise(starts), strict=True):
        first, last = np.searchsorted(wanted, [start, stop])
        inside = [number - start for number in wanted[first:last]]
        if inside:
            with failing(reader.path, reader.place):
                for number, document in reader.read(inside):
                    found[start + number] = cut(start + number, document) if isinstance(document, str) else document
    return found
