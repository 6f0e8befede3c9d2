"""Token ids from files: any integers, no more of them read than is used, refused before they are cast."""

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from stages.contracts.errors import InputError
from tests.stages.texts import drawn

IDS_ST = np.arange(60).reshape(6, 10)


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<u8", ">u2", "<i4", "|u1", "|i1"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_first_rows_and_columns_are_taken_whatever_the_integers(dtype: str, order: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS_ST.astype(dtype, order=order))
    found = drawn(tmp_path / "ids.npy", num_sequences=4, sequence_length=7)
    np.testing.assert_array_equal(found, IDS_ST[:4, :7])
    assert found.dtype == np.int32 and found.dtype.isnative


def test_a_safetensors_file_with_one_tensor_is_read(tmp_path: Path) -> None:
    save_file({"anything": IDS_ST.astype(np.uint16)}, tmp_path / "ids.safetensors")
    np.testing.assert_array_equal(drawn(tmp_path / "ids.safetensors", num_sequences=4, sequence_length=7), IDS_ST[:4, :7])


@pytest.mark.parametrize("value", [2**31, 2**32, 2**32 + 5, 2**63, -(2**32), -1, 4096])
def test_ids_beyond_int32_do_not_wrap(value: int, tmp_path: Path) -> None:
    ids_ST = np.full((1, 8), value, np.uint64 if value >= 2**63 else np.int64)
    ids_ST[0, 0] = 7
    np.save(tmp_path / "ids.npy", ids_ST)
    with pytest.raises(InputError) as raised:
        drawn(tmp_path / "ids.npy")
    assert str(raised.value) == (
        f"calibration.data holds token ids from {min(7, value)} to {max(7, value)} but the model's vocabulary is 0 to 4095; "
        f"the ids come from another tokenizer: use the model's own tokenizer"
    )


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((8, 32)), "has shape [8, 32] and dtype float64; token ids are integers [sequences, tokens]"),
        (np.zeros((8, 32), bool), "has shape [8, 32] and dtype bool; token ids are integers [sequences, tokens]"),
        (np.zeros(32, int), "has shape [32] and dtype int64; token ids are integers [sequences, tokens]"),
        (np.zeros((2, 2, 32), int), "has shape [2, 2, 32] and dtype int64; token ids are integers [sequences, tokens]"),
        (np.zeros((), int), "has shape [] and dtype int64; token ids are integers [sequences, tokens]"),
        (np.zeros((2, 8), [("a", int)]), "has shape [2, 8] and dtype [('a', '<i8')]; token ids are integers"),
        (np.array([{}]), "is not a plain numeric .npy file: "),
    ],
)
def test_what_is_not_ids_is_one_line(array: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(InputError) as raised:
        drawn(path)
    assert str(raised.value).startswith(f"calibration.data: {path} {says}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [(0, 8), (1, 0), (0, 0)])
def test_no_ids_are_too_few(shape: tuple[int, int], tmp_path: Path) -> None:
    for path in (tmp_path / "ids.npy", tmp_path / "ids.safetensors"):
        if path.suffix == ".npy":
            np.save(path, np.zeros(shape, int))
        else:
            save_file({"ids": np.zeros(shape, int)}, path)
        with pytest.raises(InputError) as raised:
            drawn(path)
        assert str(raised.value) == (
            f"calibration.data holds {shape[0]} sequences of {shape[1]} token ids ({path}) but num_sequences is 1 and "
            f"sequence_length 8; lower them"
        )


def npy(header: str, num_bytes: int) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(num_bytes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04 a zip file under another name",
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000, 1000000000), }", 64),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (4000, 8), }", 64),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-1, 8), }", 64),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1, 8)", 64),
        npy("(" * 100, 64),
        npy("{'descr': 'nonsense', 'fortran_order': False, 'shape': (1, 8), }", 64),
    ],
)
def test_a_damaged_npy_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        drawn(path)
    assert str(raised.value).startswith(f"calibration.data: {path} is not a plain numeric .npy file: ")
    assert "\n" not in str(raised.value)


def test_a_sparse_file_of_many_ids_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    path.write_bytes(npy("{'descr': '<i8', 'fortran_order': False, 'shape': (100000000, 1000), }", 0))
    with path.open("r+b") as raw:
        raw.truncate(128 + 8 * 10**11)
    start = time.process_time()
    assert not drawn(path, num_sequences=4, sequence_length=7).any()
    assert time.process_time() - start < 1
