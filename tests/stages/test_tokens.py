"""Calibration and evaluation sequences: drawn by a seed, without replacement, from the documents as the tokenizer sees them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.prepare.tokens import POOL_FACTOR, crop_ids, draw_sequences, read_texts, read_token_ids


def documents(sizes: list[int]) -> Iterator[list[int]]:
    """Documents of these sizes whose tokens count up over all of them."""
    start = 0
    for size in sizes:
        yield list(range(start, start + size))
        start += size


def test_sequences_are_pieces_of_the_joined_documents_and_none_is_drawn_twice() -> None:
    ids = draw_sequences(documents([7, 90, 3, 50]), 10, 8, seed=0, place="here")
    assert ids.shape == (10, 8)
    assert ids.dtype == np.int32
    assert all((np.diff(row) == 1).all() and row[0] % 8 == 0 for row in ids)
    assert len({int(row[0]) for row in ids}) == 10


def test_the_seed_decides_which_are_drawn() -> None:
    drawn = [draw_sequences(documents([400]), 5, 8, seed, "here").tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_large_dataset_is_not_read_whole() -> None:
    num_read = 0

    def endless() -> Iterator[list[int]]:
        nonlocal num_read
        while True:
            num_read += 1
            yield list(range(20))

    draw_sequences(endless(), 2, 10, seed=0, place="here")
    assert num_read == POOL_FACTOR


def test_exactly_enough_tokens_are_enough() -> None:
    assert draw_sequences(documents([10, 22]), 4, 8, seed=3, place="here").reshape(-1).tolist() == list(range(32))


def test_ids_are_taken_from_the_start_as_they_are(tmp_path: Path) -> None:
    ids_ST = np.arange(60).reshape(6, 10)
    np.save(tmp_path / "ids.npy", ids_ST)
    save_file({"anything": ids_ST}, tmp_path / "ids.safetensors")
    for name in ("ids.npy", "ids.safetensors"):
        found = crop_ids(read_token_ids(tmp_path / name), 4, 7, "here")
        np.testing.assert_array_equal(found, ids_ST[:4, :7])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_kind_of_text_file_is_read(tmp_path: Path, suffix: str) -> None:
    import datasets

    texts = ["one\ntwo", "three"]
    paths = [tmp_path / f"{number}{suffix}" for number in range(2)]
    for path, text in zip(paths, texts, strict=True):
        rows = datasets.Dataset.from_dict({"text": [text]})
        if suffix == ".txt":
            path.write_text(text)
        elif suffix == ".jsonl":
            rows.to_json(path)
        else:
            rows.to_parquet(path)
    found = list(read_texts([str(path) for path in paths], "text", 0, None, "here"))
    assert sorted(found) == sorted(texts)
    assert found == list(read_texts([str(path) for path in paths], "text", 0, None, "here"))
