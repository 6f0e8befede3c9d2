"""Calibration and evaluation sequences: drawn by a seed, without replacement, from the documents as the tokenizer sees them."""

from collections.abc import Iterator

import numpy as np
import pytest

from stages.contracts.documents import Document
from stages.contracts.errors import InputError
from stages.contracts.windows import NO_TOKEN, scored
from stages.prepare.tokens import POOL_FACTOR, draw_sequences, slide


def documents(sizes: list[int]) -> Iterator[Document]:
    """Documents of these sizes whose tokens count up over all of them."""
    start = 0
    for size in sizes:
        yield Document(np.arange(start, start + size), np.arange(start, start + size) % 5)
        start += size


def test_sequences_are_pieces_of_the_joined_documents_and_none_is_drawn_twice() -> None:
    ids = draw_sequences(documents([7, 90, 3, 50]), 10, 8, seed=0, source="here").token_ids_ST
    assert ids.shape == (10, 8)
    assert all((np.diff(row) == 1).all() and row[0] % 8 == 0 for row in ids)
    assert len({int(row[0]) for row in ids}) == 10


def test_the_seed_decides_which_are_drawn() -> None:
    drawn = [draw_sequences(documents([400]), 5, 8, seed, "here").token_ids_ST.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_large_dataset_is_not_read_whole() -> None:
    num_read = 0

    def endless() -> Iterator[Document]:
        nonlocal num_read
        while True:
            num_read += 1
            yield Document(np.arange(20))

    draw_sequences(endless(), 2, 10, seed=0, source="here")
    assert num_read == POOL_FACTOR


def test_exactly_enough_tokens_are_enough() -> None:
    found = draw_sequences(documents([10, 22]), 4, 8, seed=3, source="here")
    assert found.token_ids_ST.reshape(-1).tolist() == list(range(32))


def test_too_few_tokens_are_one_line() -> None:
    with pytest.raises(InputError) as raised:
        draw_sequences(documents([10, 21]), 4, 8, seed=0, source="here")
    assert str(raised.value) == (
        "here holds 31 tokens in 2 documents (at most 512 characters of each are read) but num_sequences 4 x "
        "sequence_length 8 = 32; give more text or lower one of them"
    )


def test_documents_and_bytes_are_those_of_what_is_drawn() -> None:
    found = draw_sequences(documents([7, 90, 3, 50]), 2, 8, seed=0, source="here")
    ids = found.token_ids_ST
    assert found.num_bytes == int((ids[:, 1:] % 5).sum()), "the first token of a sequence is not predicted"
    drawn = set(ids.reshape(-1).tolist())
    every = [document.token_ids_T.tolist() for document in documents([7, 90, 3, 50])]
    assert [one.tolist() for one in found.documents] == [one for one in every if drawn & set(one)]
    assert 0 < len(found.documents) < 4


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
    is_scored = scored(found.token_ids_ST, 0, stride)
    for row, scores, (begin, end, first) in zip(found.token_ids_ST, is_scored, due, strict=True):
        assert row.tolist() == [*range(begin, end), *[NO_TOKEN] * (length - end + begin)]
        assert row[scores].tolist() == list(range(first, end))
    assert found.num_bytes == sum(token % 5 for _, end, first in due for token in range(first, end))
    in_two = np.concatenate([scored(found.token_ids_ST[:1], 0, stride), scored(found.token_ids_ST[1:], 1, stride)])
    assert (in_two == is_scored).all(), "token shards do not matter"
    with pytest.raises(InputError, match=rf"num_sequences is {len(due) + 1}; use at most {len(due)}$"):
        slide(document, len(due) + 1, length, stride, "here")
