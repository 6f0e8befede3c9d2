"""Documents of a text in a seeded order, whatever its files: bounded memory, no copy on disk, no seeking.

A first pass counts the documents. A seeded permutation of their numbers then says which are wanted, some at a time, and each
further pass picks those out of the files: a compressed file can be read in no other way, and any machine finds the same.
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
"""Documents that the permutation covers: 128 MiB. Of more, as many are considered, evenly spaced over all."""
_CHARACTERS_A_TOKEN = 6
"""More than most tokenizers make of most texts: one pass picks enough then."""

_READERS: dict[str | None, type[Reader]] = {"json": JsonReader, "text": TextReader, "parquet": ParquetReader}


def read_documents(files: Sequence[Path], text_field: str, seed: int, max_characters: int, place: str) -> Iterator[str]:
    """Documents of files of one kind in a seeded order; of a longer one its first max_characters.

    Raises InputError for a file that is damaged or has something else than text in text_field.
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


def seeded_order(num_documents: int, seed: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Numbers of the documents in the order in which they are read, int64 [at most MAX_ORDERED]."""
    num_ordered = min(num_documents, MAX_ORDERED)
    order_D: np.ndarray[tuple[int], np.dtype[np.int64]] = np.random.default_rng(seed).permutation(num_ordered)
    return order_D if num_ordered == num_documents else order_D * num_documents // num_ordered


def _pick(readers: Sequence[Reader], starts: Sequence[int], wanted: Sequence[int], max_characters: int) -> dict[int, str]:
    """Texts by number, of documents whose numbers are sorted. starts: first number of each file, and the total."""
    texts: dict[int, str] = {}
    for reader, (start, stop) in zip(readers, pairwise(starts), strict=True):
        first, last = np.searchsorted(wanted, [start, stop])
        inside = [number - start for number in wanted[first:last]]
        if inside:
            with failing(reader.path, reader.place):
                for number, text in reader.read(inside):
                    texts[start + number] = text[:max_characters]
    return texts
