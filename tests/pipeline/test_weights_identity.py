"""Which changes of a weight file make another model of it."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.run.weights_identity import NUM_SAMPLES, SAMPLE_BYTES, sampled_ranges, weights_identity
from stages.checkpoint.folder import Checkpoint

FILE = "model.safetensors"
LARGE_BYTES = 40_000
LARGE, SMALL = 12, 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of 480 kB: large tensors, of which pieces are read, and a few small ones, of which all is read."""
    tensors = {f"large.{n:02d}": np.full(LARGE_BYTES, n, np.uint8) for n in range(LARGE)}
    tensors |= {f"small.{n}": np.full(1000 + n, n, np.uint8) for n in range(SMALL)}
    save_file(tensors, tmp_path / FILE)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    return tmp_path


def identity(folder: Path) -> str:
    return weights_identity(Checkpoint(folder))[FILE]


def edit(folder: Path, position: int, num_bytes: int = 1) -> None:
    content = bytearray((folder / FILE).read_bytes())
    content[position : position + num_bytes] = bytes(byte ^ 255 for byte in content[position : position + num_bytes])
    (folder / FILE).write_bytes(content)


@pytest.mark.parametrize("name", [f"large.{n:02d}" for n in range(LARGE)] + [f"small.{n}" for n in range(SMALL)])
def test_a_fine_tune_of_any_one_tensor_is_another_model(folder: Path, name: str) -> None:
    """Also one in the middle of a file, far from both ends."""
    before, entry = identity(folder), Checkpoint(folder).raw_tensors[name]
    edit(folder, entry.begin, entry.num_bytes)
    assert identity(folder) != before
    edit(folder, entry.begin, entry.num_bytes)
    assert identity(folder) == before


@pytest.mark.parametrize(
    ("place", "is_seen"),
    [
        (lambda num_bytes: 0, True),
        (lambda num_bytes: SAMPLE_BYTES - 1, True),
        (lambda num_bytes: num_bytes // 2, True),
        (lambda num_bytes: num_bytes - 1, True),
        (lambda num_bytes: SAMPLE_BYTES, False),
    ],
)
def test_a_single_byte_is_seen_in_the_samples_and_not_between_them(
    folder: Path, place: Callable[[int], int], is_seen: bool
) -> None:
    before, entry = identity(folder), Checkpoint(folder).raw_tensors["large.06"]
    edit(folder, entry.begin + place(entry.num_bytes))
    assert (identity(folder) != before) == is_seen


def test_of_a_large_tensor_three_pieces_are_read_and_neighbours_at_once(folder: Path) -> None:
    header = Checkpoint(folder).headers[FILE]
    size = (folder / FILE).stat().st_size
    ranges = sampled_ranges(header, size)
    assert len(ranges) == 2 * LARGE + 1, "the end of a tensor and the beginning of the next are one piece"
    assert ranges[0][0] == 0 and ranges[-1][1] == size
    assert all(end < begin for (_, end), (begin, _) in pairwise(ranges))
    small = sum(entry.num_bytes for entry in header.entries if entry.num_bytes < 2000)
    read = sum(end - begin for begin, end in ranges)
    assert read == header.entries[0].begin + small + LARGE * NUM_SAMPLES * SAMPLE_BYTES


def test_a_renamed_tensor_is_another_model(folder: Path) -> None:
    before, path = identity(folder), folder / FILE
    path.write_bytes(path.read_bytes().replace(b"large.05", b"large.55", 1))
    assert identity(folder) != before
