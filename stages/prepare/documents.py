"""Documents of a text in a seeded order for all kinds of files: with bounded memory, no copy on disk and no seeking.

A first pass counts the documents. A seeded permutation of their numbers then gives the order. Each further pass over the files
picks the next batch of documents in that order. Passes are necessary because compressed files cannot be sought. The result is
the same on any machine.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from stages.io.texts import kind_of
from stages.prepare.lines import JsonReader, TextReader
from stages.prepare.reading import Reader, failing
from stages.prepare.rows import ParquetReader

MAX_ORDERED = 1 << 24
"""Maximum number of documents in the permutation, which then takes 128 MiB.
Of more documents, this many are used, evenly spaced."""
_CHARACTERS_A_TOKEN = 6
"""More characters per token than in most texts with most tokenizers, so that one pass usually picks enough documents."""

_READERS: dict[str | None, type[Reader]] = {"json": JsonReader, "text": TextReader, "parquet": ParquetReader}


def read_documents(files: Sequence[Path], text_field: str, seed: int, max_characters: int, place: str) -> Iterator[str]:
    """Documents of files of one kind in a seeded order. Documents longer than max_characters are cut.

    Raises InputError for a damaged file, or one whose text_field is not text.
    """
    readers = [_READERS[kind_of(path.name)](path, text_field, place) for path in files]
    sizes = []
    for reader in readers:
        with failing(reader.path, place):
            sizes.append(reader.measure())
    starts = [0, *accumulate(size.num_documents for size in sizes)]
    order_D = seeded_order(starts[-1], seed)
    mean_characters = min(max_characters, max(1, sum(size.num_bytes for size in sizes) // max(1, starts[-1])))
    num_wanted, begin = 1 + _CHARACTERS_A_TOKEN * max_characters // mean_characters, 0
    while begin < len(order_D):
        wanted = order_D[begin : begin + num_wanted].tolist()
        texts = _pick(readers, starts, sorted(wanted), max_characters)
        yield from (texts.pop(number) for number in wanted)
        begin += len(wanted)
        num_wanted *= 2


def read_in_order(files: Sequence[Path], text_field: str, max_characters: int, place: str) -> Iterator[str]:
    """Documents of files of one kind as they stand there, until they have max_characters in all; the last may be cut.

    Raises InputError for a damaged file, or one whose text_field is not text.
    """
    left = max_characters
    for path in files:
        reader = _READERS[kind_of(path.name)](path, text_field, place)
        with failing(path, place):
            for _, text in reader.read(range(reader.measure().num_documents)):
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    return


def seeded_order(num_documents: int, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Numbers of the documents in reading order, int64 [at most MAX_ORDERED]."""
    num_ordered = min(num_documents, MAX_ORDERED)
    order_D: np.ndarray[tuple[int], np.dtype[np.int64]] = np.random.default_rng(seed).permutation(num_ordered)
    return order_D if num_ordered == num_documents else order_D * num_documents // num_ordered


def _pick(readers: Sequence[Reader], starts: Sequence[int], wanted: Sequence[int], max_characters: int) -> dict[int, str]:
    """Texts by document number. wanted: sorted numbers. starts: number of each file's first document, and the total."""
    texts: dict[int, str] = {}
    for reader, (start, stop) in zip(readers, pairwise(starts), strict=True):
        first, last = np.searchsorted(wanted, [start, stop])
        inside = [number - start for number in wanted[first:last]]
        if inside:
            with failing(reader.path, reader.place):
                for number, text in reader.read(inside):
                    texts[start + number] = text[:max_characters]
    return texts
