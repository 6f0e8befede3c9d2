"""Documents that two texts share: found by hashes of their windows, whatever was cut or changed around them."""

from pathlib import Path

import numpy as np
import pytest

from stages.contracts.documents import WINDOW_TOKENS, fingerprint, num_shared, read_documents, write_documents

CHANCE = np.random.default_rng(0)
LONG = [CHANCE.integers(0, 30_000, 900) for _ in range(6)]


def shared(ours: list[np.ndarray], theirs: list[np.ndarray]) -> int:
    return num_shared([fingerprint(one) for one in ours], [fingerprint(one) for one in theirs])


def test_equal_documents_are_shared_in_any_order_and_others_are_not() -> None:
    assert shared(LONG[:4], [*LONG[2:][::-1]]) == 2
    assert shared(LONG[:3], LONG[3:]) == 0


@pytest.mark.parametrize(
    ("change", "is_shared"),
    [
        (lambda one: one[37:], True),
        (lambda one: np.concatenate([np.arange(50), one[:800]]), True),
        (lambda one: np.where(np.arange(900) == 450, 1, one), True),
        (lambda one: one[:600][::-1], False),
        (lambda one: np.concatenate([one[:200], LONG[5][:700]]), False),
    ],
    ids=["cut", "moved", "a changed token", "reversed", "a fifth of it"],
)
def test_a_document_counts_if_half_of_it_is_there(change: object, is_shared: bool) -> None:
    assert callable(change)
    assert shared([change(LONG[0])], [LONG[0]]) == is_shared


@pytest.mark.parametrize("num_tokens", [1, 5, WINDOW_TOKENS - 1, WINDOW_TOKENS])
def test_short_documents_are_compared_whole(num_tokens: int) -> None:
    one = np.arange(num_tokens)
    assert shared([one], [one]) == 1
    assert shared([one], [np.append(one[:-1], 99_999)]) == 0


def test_an_empty_document_is_in_no_other() -> None:
    assert len(fingerprint(np.empty(0, np.int64))) == 0
    assert shared([np.empty(0, np.int64)], LONG) == 0


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    documents = [*LONG[:2], np.empty(0, np.int64), LONG[3]]
    write_documents(tmp_path / "documents.arrow", documents)
    found = read_documents(tmp_path / "documents.arrow")
    assert [one.tolist() for one in found] == [fingerprint(one).tolist() for one in documents]
