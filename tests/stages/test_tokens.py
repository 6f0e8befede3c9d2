"""Calibration and evaluation sequences: drawn by a seed, without replacement, from the documents as the tokenizer sees them."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stages.contracts.errors import InputError
from stages.prepare import tokens
from stages.prepare.tokens import POOL_FACTOR, Tokens, draw_sequences


def drawn(*args: Any, **settings: Any) -> "np.ndarray[Any, Any]":
    """All that is drawn, [S, T]."""
    found = draw_sequences(*args, **settings)
    return found.part(0, len(found))


def documents(sizes: list[int]) -> Iterator[Tokens]:
    """Documents of these sizes whose tokens count up over all of them."""
    start = 0
    for size in sizes:
        yield np.arange(start, start + size)
        start += size


def test_sequences_are_pieces_of_the_joined_documents_and_none_is_drawn_twice() -> None:
    ids = drawn(documents([7, 90, 3, 50]), 10, 8, seed=0, source="here")
    assert ids.shape == (10, 8)
    assert all((np.diff(row) == 1).all() and row[0] % 8 == 0 for row in ids)
    assert len({int(row[0]) for row in ids}) == 10


def test_the_seed_decides_which_are_drawn() -> None:
    found = [drawn(documents([400]), 5, 8, seed, "here").tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_a_large_dataset_is_not_read_whole() -> None:
    num_read = 0

    def endless() -> Iterator[Tokens]:
        nonlocal num_read
        while True:
            num_read += 1
            yield np.arange(20)

    draw_sequences(endless(), 2, 10, seed=0, source="here")
    assert num_read == POOL_FACTOR


def test_exactly_enough_tokens_are_enough() -> None:
    assert drawn(documents([10, 22]), 4, 8, seed=3, source="here").reshape(-1).tolist() == list(range(32))


def test_too_few_tokens_are_one_line() -> None:
    with pytest.raises(InputError) as raised:
        draw_sequences(documents([10, 21]), 4, 8, seed=0, source="here")
    assert str(raised.value) == (
        "here holds 31 tokens in 2 documents (at most 512 characters of each are read) but num_sequences 4 x "
        "sequence_length 8 = 32; give more text or lower one of them"
    )


def documents_of(rows: "np.ndarray[Any, Any]", sizes: list[int]) -> list[int]:
    """Document of each sequence's first token."""
    ends = np.cumsum(sizes)
    return [int(np.argmax(ends > row[0])) for row in rows]


@pytest.mark.parametrize("seed", range(4))
def test_an_even_draw_takes_as_many_sequences_from_a_short_document_as_from_a_long_one(seed: int) -> None:
    sizes = [400, 40, 80, 160]
    ids = drawn(documents(sizes), 8, 8, seed, "here", is_even=True)
    assert Counter(documents_of(ids, sizes)) == dict.fromkeys(range(4), 2)
    assert len({int(row[0]) for row in ids}) == 8
    assert all((np.diff(row) == 1).all() and row[0] % 8 == 0 for row in ids)


def test_an_even_draw_takes_more_where_others_have_no_more() -> None:
    sizes = [8, 16, 400]
    ids = drawn(documents(sizes), 10, 8, 0, "here", is_even=True)
    assert Counter(documents_of(ids, sizes)) == {0: 1, 1: 2, 2: 7}


def test_an_even_draw_of_more_documents_takes_one_of_each_by_the_seed() -> None:
    sizes = [16] * 30
    found = [documents_of(drawn(documents(sizes), 6, 8, seed, "here", is_even=True), sizes) for seed in (0, 0, 1)]
    assert len(set(found[0])) == 6 and found[0] == found[1] != found[2]


def test_a_large_draw_takes_the_memory_of_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool lies in a file, and is no larger than what is wanted where that is much."""
    monkeypatch.setattr(tokens, "MAX_POOL", 1 << 15)

    def peak(num_sequences: int) -> int:
        num_read = 0

        def endless() -> Iterator[Tokens]:
            nonlocal num_read
            while True:
                num_read += 1
                yield np.full(1024, num_read)

        tracemalloc.start()
        try:
            found = draw_sequences(endless(), num_sequences, 1024, seed=0, source="here")
            assert num_read == max(num_sequences, min(POOL_FACTOR * num_sequences, 32))
            for start in range(0, num_sequences, 8):
                assert found.part(start, start + 8).shape == (min(8, num_sequences - start), 1024)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(2048) < 2 * peak(64), "16 MiB are drawn"
