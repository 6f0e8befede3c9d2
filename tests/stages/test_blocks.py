"""The stream of an output file: the bytes that whole tensors give, every source byte read once, memory that does not grow."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.io.files import read_into, write_bytes, write_file
from stages.merge import blocks
from stages.merge.blocks import BUFFERS, ComputedMean, Mean, PlainMean, Stretch, write_means
from tests.runs import run_all, token_ids
from tests.tiny import build, save

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
    bits = torch.tensor([-(2**31), 0x00001234, 1, 0x7F800000], dtype=torch.int32)
    mean = PlainMean([(stored(tmp_path, bits.view(torch.float32)), 1.0)], torch.float32, "copy", may_be_infinite=True)
    write_file(tmp_path / "out", lambda out: write_means(out, [mean]))
    assert (tmp_path / "out").read_bytes() == bits.numpy().tobytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_a_copy_that_is_not_finite_is_refused_and_no_file_left(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensor = torch.zeros(1000, dtype=dtype)
    tensor[999] = value
    (tmp_path / "out").mkdir()
    for mean in (PlainMean([(stored(tmp_path, tensor), 1.0)], dtype, "f: tensor x"), computed(tensor, dtype)):
        with pytest.raises(InputError, match=r"^f: tensor x holds NaN or infinity; download the checkpoint again$"):
            write_file(tmp_path / "out" / "x", lambda out, mean=mean: write_means(out, [mean]))
    assert not [*(tmp_path / "out").iterdir()]


def computed(tensor: Tensor, dtype: torch.dtype) -> Mean:
    return ComputedMean([(tensor, 1.0)], 1, dtype, "f: tensor x")


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        (torch.float8_e4m3fn, 0x7F), (torch.float8_e5m2, 0x7D), (torch.float8_e8m0fnu, 0xFF), (torch.float8_e4m3fnuz, 0x80),
        (torch.float8_e5m2fnuz, 0x80),
    ],
)  # fmt: skip
def test_codes_of_nan_in_one_byte_are_known(dtype: torch.dtype, code: int, tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    fine = codes[torch.isfinite(codes.view(dtype).float())]
    write_file(tmp_path / "out", lambda out: write_means(out, [PlainMean([(stored(tmp_path, fine), 1.0)], dtype, "x")]))
    assert (tmp_path / "out").read_bytes() == fine.numpy().tobytes()
    fine[7] = code
    with pytest.raises(InputError, match=r"^x holds NaN"):
        write_file(tmp_path / "bad", lambda out: write_means(out, [PlainMean([(stored(tmp_path, fine), 1.0)], dtype, "x")]))


def test_what_is_not_loaded_may_hold_infinities_of_both_signs_but_no_nan(tmp_path: Path) -> None:
    mask = torch.tensor([float("inf"), 0.0, float("-inf")])
    for values, is_fine in ((mask, True), (torch.tensor([float("nan"), 0.0]), False)):
        mean = PlainMean([(stored(tmp_path, values), 1.0)], torch.float32, "x", may_be_infinite=True)
        if is_fine:
            write_file(tmp_path / "out", lambda out, mean=mean: write_means(out, [mean]))
            assert (tmp_path / "out").read_bytes() == values.numpy().tobytes()
        else:
            with pytest.raises(InputError, match=r"^x holds NaN; download the checkpoint again$"):
                write_file(tmp_path / "bad", lambda out, mean=mean: write_means(out, [mean]))


def test_sums_that_overflow_are_not_mistaken_for_infinity(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        large = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)
        name = tmp_path / str(dtype)
        write_file(name, lambda out, t=large: write_means(out, [PlainMean([(stored(tmp_path, t), 1.0)], t.dtype, "x")]))
        assert name.read_bytes() == large.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("num_members", [1, 2])
def test_values_too_large_for_float16_are_refused_with_the_setting(num_members: int, tmp_path: Path) -> None:
    values = torch.full((10,), 7e4)
    members = [(values, 1 / num_members)] * num_members
    with pytest.raises(InputError, match=r"^x(: the merged expert)? exceeds float16; set export\.dtype to bfloat16$"):
        write_file(tmp_path / "out", lambda out: write_means(out, [ComputedMean(members, num_members, torch.float16, "x")]))
    assert not (tmp_path / "out").exists()


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
