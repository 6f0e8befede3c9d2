"""Calibration and evaluation sequences: drawn by a seed, without replacement, from the documents as the tokenizer sees them."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stages.contracts.errors import InputError
from stages.contracts.windows import NO_TOKEN, scored
from stages.prepare import tokens
from stages.prepare.tokens import POOL_FACTOR, Encoded, draw_sequences, slide


def drawn(*args: Any, **settings: Any) -> "np.ndarray[Any, Any]":
    """All that is drawn, [S, T]."""
    found = draw_sequences(*args, **settings)
    return found.part(0, len(found))


def documents(sizes: list[int]) -> Iterator[Encoded]:
    """Documents of these sizes whose tokens count up over all of them."""
    start = 0
    for size in sizes:
        yield Encoded(np.arange(start, start + size), np.arange(start, start + size) % 5)
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

    def endless() -> Iterator[Encoded]:
        nonlocal num_read
        while True:
            num_read += 1
            yield Encoded(np.arange(20))

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

        def endless() -> Iterator[Encoded]:
            nonlocal num_read
            while True:
                num_read += 1
                yield Encoded(np.full(1024, num_read))

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


def test_documents_and_bytes_are_those_of_what_is_drawn() -> None:
    found = draw_sequences(documents([7, 90, 3, 50]), 2, 8, seed=0, source="here")
    ids = found.part(0, len(found))
    assert found.num_bytes == int((ids[:, 1:] % 5).sum()), "the first token of a sequence is not predicted"
    seen = set(ids.reshape(-1).tolist())
    every = [document.token_ids_T.tolist() for document in documents([7, 90, 3, 44])]  # the pool is cut to whole sequences
    used = [one.tolist() for one in found.documents()]
    assert used == [one for one in every if seen & set(one)]
    assert 0 < len(used) < 4


@pytest.mark.parametrize(
    ("num_tokens", "length", "stride"), [(30, 8, 3), (29, 8, 3), (8, 8, 8), (9, 8, 1), (5, 8, 4), (24, 8, 8)]
)
def test_sliding_sequences_predict_every_token_once_with_enough_before_it(num_tokens: int, length: int, stride: int) -> None:
    """Against the loop of transformers' page on perplexity: windows begin at multiples of the stride, and what the window
    before has predicted is context."""
    due, end_before = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        due.append((begin, end, max(end_before, begin + 1)))
        end_before = end
        if end == num_tokens:
            break
    (document,) = documents([num_tokens])
    found = slide(document, len(due), length, stride, "here")
    ids = found.part(0, len(found))
    is_scored = scored(ids, 0, stride)
    for row, scores, (begin, end, first) in zip(ids, is_scored, due, strict=True):
        assert row.tolist() == [*range(begin, end), *[NO_TOKEN] * (length - end + begin)]
        assert row[scores].tolist() == list(range(first, end))
    assert found.num_bytes == sum(token % 5 for _, end, first in due for token in range(first, end))
    in_two = np.concatenate([scored(ids[:1], 0, stride), scored(ids[1:], 1, stride)])
    assert (in_two == is_scored).all(), "token shards do not matter"
    with pytest.raises(InputError, match=rf"num_sequences is {len(due) + 1}; use at most {len(due)}$"):
        slide(document, len(due) + 1, length, stride, "here")
