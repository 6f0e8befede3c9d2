"""The stream of an output file: the bytes that whole tensors give, every source byte read once, memory that does not grow."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.common.checkpoint import Checkpoint
from stages.common.errors import InputError
from stages.common.files import read_into, write_bytes, write_file
from stages.merge import blocks
from stages.merge.blocks import BUFFERS, ComputedMean, Mean, PlainMean, Stretch, write_means
from tests.stages.runs import run_all, token_ids
from tests.stages.tiny import build, save

BLOCK_BYTES = 256
SHARES = (0.37, 0.42, 0.21)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK_BYTES)


def stored(folder: Path, tensor: Tensor) -> Stretch:
    """Put a tensor's bytes in the middle of a file."""
    data = tensor.view(torch.uint8).numpy().tobytes()
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    write_bytes(path, b"before" + data + b"after")
    return Stretch(path, 6, len(data))


def whole(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The weighted sum of whole tensors, as the definition says: in order, in float32, rounded once."""
    total = torch.zeros(tensors[0].shape)
    for tensor, share in zip(tensors, SHARES, strict=True):
        total.add_(tensor.float(), alpha=share)
    return total.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 31, 128, 1000])
def test_blocks_give_the_bytes_that_whole_tensors_give(dtype: torch.dtype, size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(size, dtype=torch.float64).to(dtype) for _ in SHARES]
    stretches = [stored(tmp_path, tensor) for tensor in tensors]
    means: list[Mean] = [
        PlainMean(list(zip(stretches, SHARES, strict=True)), dtype, "sum"),
        PlainMean([(stretches[1], 1.0)], dtype, "copy"),
        ComputedMean(zip(tensors, SHARES, strict=True), len(SHARES), dtype, "computed sum"),
        ComputedMean([(tensors[2], 1.0)], 1, dtype, "computed copy"),
    ]
    write_file(tmp_path / "out", lambda out: write_means(out, means))
    due = [whole(tensors, dtype), tensors[1], whole(tensors, dtype), tensors[2]]
    assert (tmp_path / "out").read_bytes() == b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in due)


def test_a_copy_keeps_what_arithmetic_would_change(tmp_path: Path) -> None:
    bits = torch.tensor([-(2**31), 0x7FC01234, 1, 0x7F800000], dtype=torch.int32)
    mean = PlainMean([(stored(tmp_path, bits.view(torch.float32)), 1.0)], torch.float32, "copy")
    write_file(tmp_path / "out", lambda out: write_means(out, [mean]))
    assert (tmp_path / "out").read_bytes() == bits.numpy().tobytes()


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are read lie in as many places as there are buffers, whatever the number of blocks and members."""
    read, written = set(), set()

    def noting(path: Path, begin: int, view: memoryview) -> None:
        read.add(torch.frombuffer(view, dtype=torch.uint8).data_ptr())
        read_into(path, begin, view)

    monkeypatch.setattr(blocks, "read_into", noting)
    stretches = [stored(tmp_path, torch.randn(5000)) for _ in SHARES]
    means = [PlainMean(list(zip(stretches, SHARES, strict=True)), torch.float32, "sum")] * 3

    class Noting:
        def write(self, data: memoryview) -> int:
            written.add(torch.frombuffer(data, dtype=torch.uint8).data_ptr())
            return len(data)

    write_means(Noting(), means)  # type: ignore[arg-type]
    assert len(read) == len(written) == BUFFERS
    assert not read & written


@pytest.mark.parametrize("is_fused", [False, True], ids=["one by one", "fused"])
def test_every_byte_of_the_source_is_read_once_at_most(is_fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each target; and what is not merged away is read: only the router is read by other means."""
    source = save(build("mixtral", torch.float32), tmp_path / "source", save_original_format=not is_fused)
    counts: Counter[tuple[str, int]] = Counter()

    def counting(path: Path, begin: int, view: memoryview) -> None:
        counts.update((path.name, position) for position in range(begin, begin + view.nbytes))
        read_into(path, begin, view)

    monkeypatch.setattr(blocks, "read_into", counting)
    path, _ = token_ids(tmp_path)
    run_all(source, tmp_path / "run", path, [3], ["stock"])
    assert set(counts.values()) == {1}
    tensors = Checkpoint(source).tensors.values()
    assert len(counts) == sum(entry.num_bytes for entry in tensors if not entry.name.endswith("gate.weight"))


def test_a_file_that_has_become_shorter_is_named(tmp_path: Path) -> None:
    stretch = stored(tmp_path, torch.randn(1000))
    stretch.path.write_bytes(stretch.path.read_bytes()[:2000])
    with pytest.raises(InputError, match=rf"{stretch.path} ends at byte 2,000 .* changed during the run"):
        write_file(tmp_path / "out", lambda out: write_means(out, [PlainMean([(stretch, 1.0)], torch.float32, "x")]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_a_write_that_fails_ends_the_threads(stop: BaseException, tmp_path: Path) -> None:
    class Full:
        def write(self, _data: memoryview) -> int:
            raise stop

    num_begun = 0

    def means() -> Iterator[Mean]:
        nonlocal num_begun
        while True:
            num_begun += 1
            yield PlainMean([(stretch, 1.0)], torch.float32, "x")

    stretch = stored(tmp_path, torch.randn(1000))
    with pytest.raises(type(stop)):
        write_means(Full(), means())  # type: ignore[arg-type]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert num_begun < 5
