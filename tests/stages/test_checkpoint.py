"""Safetensors headers and checkpoint folders are checked before anything in them is used."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.headers import read_header, write_header
from stages.contracts.errors import InputError
from stages.io.files import write_file

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, fields: Any, num_data_bytes: int = 32, header: bytes | None = None) -> Path:
    text = json.dumps(fields).encode() if header is None else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_data_bytes))
    return path


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_a_header_lists_tensors_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"b": GOOD["b"], "a": GOOD["a"], "__metadata__": {"format": "pt"}})
    header = read_header(path)
    begin = path.stat().st_size - 32
    assert [(e.name, e.dtype, e.shape, e.begin, e.num_bytes) for e in header.entries] == [
        ("a", "F32", (2, 3), begin, 24),
        ("b", "BF16", (4,), begin + 24, 8),
    ]
    assert header.metadata == {"format": "pt"}


BAD_FIELDS: dict[str, tuple[Any, str]] = {
    "overlap": (changed("b", data_offsets=[20, 28]), "tensor b .* overlaps the tensor before it"),
    "gap": ({**GOOD, "b": {**GOOD["b"], "data_offsets": [25, 33]}}, "tensor b .* leaves a gap before it"),
    "gap at the start": ({"b": GOOD["b"]}, "tensor b .* leaves a gap"),
    "less than the shape needs": (changed("a", data_offsets=[0, 20]), r"tensor a \(F32 \[2, 3\]\) needs 24 bytes .* span 20"),
    "end before begin": (changed("a", data_offsets=[24, 0]), "tensor a .* needs 24 bytes"),
    "huge shape": (changed("a", shape=[2**62, 2**62]), "tensor a .* needs"),
    "negative offset": (changed("a", data_offsets=[-8, 16]), "integers >= 0"),
    "negative size": (changed("a", shape=[-2, -3]), "integers >= 0"),
    "fractional size": (changed("a", shape=[2.0, 3]), "integers >= 0"),
    "boolean size": (changed("a", shape=[True, 6]), "integers >= 0"),
    "three offsets": (changed("a", data_offsets=[0, 12, 24]), "tensor a lacks"),
    "no offsets": (changed("a", data_offsets=None), "tensor a lacks"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, "tensor a lacks"),
    "not an object": ({"a": 7}, "tensor a lacks"),
    "unknown dtype": (changed("a", dtype="F31"), "tensor a has the unknown dtype 'F31'"),
    "dtype of a wrong type": (changed("a", dtype=["F32"]), "tensor a has the unknown dtype"),
    "metadata of a wrong type": ({**GOOD, "__metadata__": {"n": 1}}, "__metadata__ must map strings to strings"),
    "a list": ([1, 2], "not a JSON object"),
    "sizes of a huge product": (changed("a", shape=[2**62] * 60), r"tensor a \(F32 .*\) needs more bytes than the \S+ of"),
    "a size with a thousand digits": (changed("a", shape=[10**999, 0]), "all must be integers >= 0 and below 2\\^63"),
    "a million axes": (changed("a", shape=[1] * 10**6), "tensor a has 1,000,000 axes; at most 64 are read"),
    "a product beyond 64 bits, then a zero": (
        {"z": {"dtype": "F32", "shape": [2**62, 8, 0], "data_offsets": [0, 0]}, **GOOD}, "tensor z .* needs more bytes",
    ),
    "half a byte": (changed("a", dtype="F4", shape=[47]), r"tensor a \(F4 \[47\]\) ends within a byte"),
    "half a character in a name": ({"a\ud800": GOOD["a"]}, r"tensor 'a\\ud800': a name has .* printable"),
    "a name of two lines": ({"a\nb": GOOD["a"]}, r"tensor 'a\\nb': a name has .* printable"),
    "a name without end": ({"a" * 2000: GOOD["a"]}, r"tensor a{80}\.\.\. \(2,000 characters\): a name has at most 1000"),
    "half a character in the metadata": ({**GOOD, "__metadata__": {"x": "\udfff"}}, "__metadata__ holds half a character"),
    "half a character in a key of the metadata": ({**GOOD, "__metadata__": {"\udfff": ""}}, "__metadata__ holds half a char"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_header_that_lies_is_refused_with_file_and_tensor(tmp_path: Path, case: str) -> None:
    fields, message = BAD_FIELDS[case]
    path = write(tmp_path / "x.safetensors", fields)
    with pytest.raises(InputError, match=f"^{re.escape(str(path))}.*{message}") as caught:
        read_header(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2500, "one line that can be read"


@pytest.mark.parametrize(
    "header",
    [b"{not json", b"\xff\xfe{}", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["not JSON", "not UTF-8", "deep", "long number"],
)
def test_a_header_that_is_not_json_is_refused(tmp_path: Path, header: bytes) -> None:
    path = write(tmp_path / "x.safetensors", None, header=header)
    with pytest.raises(InputError, match=rf"{path}: the safetensors header is not JSON"):
        read_header(path)


def test_what_stands_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    one = json.dumps(GOOD["a"])
    path = write(tmp_path / "x.safetensors", None, num_data_bytes=24, header=f'{{"a": {one}, "a": {one}}}'.encode())
    with pytest.raises(InputError, match=rf"{path}: the safetensors header has a twice; download the file again"):
        read_header(path)


def test_a_header_of_many_values_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("json.loads", lambda *_, **__: pytest.fail("it was parsed"))
    path = write(tmp_path / "x.safetensors", None, header=b'{"a": [' + b"[]," * 3_000_000 + b"0]}")
    with pytest.raises(InputError, match=r"has some 6,000,002 values; at most 4,194,304 are read"):
        read_header(path)


def test_holes_in_place_of_a_header_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    path = tmp_path / "x.safetensors"
    with path.open("wb") as raw:
        raw.write((99_999_999).to_bytes(8, "little"))
        raw.truncate(10**9)
    monkeypatch.setattr(
        "stages.checkpoint.headers.read_range", lambda p, begin, count: read.append(count) or p.open("rb").read(9)
    )
    with pytest.raises(InputError, match=r"the safetensors header is not JSON: it begins with b'\\x00'"):
        read_header(path)
    assert read == [9]


def test_empty_tensors_and_absent_metadata_are_fine(tmp_path: Path) -> None:
    empty = {name: {"dtype": "F32", "shape": [4, 0], "data_offsets": [24, 24]} for name in ("x", "y")}
    path = write(tmp_path / "x.safetensors", {**empty, **GOOD, "__metadata__": None})
    header = read_header(path)
    assert [(entry.name, entry.num_bytes) for entry in header.entries] == [("a", 24), ("x", 0), ("y", 0), ("b", 8)]
    assert header.metadata == {}


@pytest.mark.parametrize("name", ["x.safetensors", "config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(kind: str, name: str, tmp_path: Path) -> None:
    folder_with(tmp_path, {"a": "x.safetensors"}, {"x.safetensors": ONE})
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    found = "folder" if kind == "folder" else "pipe, socket or device"
    with pytest.raises(InputError, match=rf"{path} is a {found}; a regular file is needed"):
        _ = Checkpoint(tmp_path).config, Checkpoint(tmp_path).tensors


def test_links_are_followed_as_in_the_hubs_cache_and_dangling_ones_refused(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "1"
    folder.mkdir(parents=True)
    folder_with(folder, {"a": "x.safetensors"}, {"x.safetensors": ONE})
    (folder / "x.safetensors").rename(tmp_path / "blob")
    (folder / "x.safetensors").symlink_to("../../blob")
    assert list(Checkpoint(folder).tensors) == ["a"]
    (tmp_path / "blob").unlink()
    with pytest.raises(InputError, match=r"x\.safetensors does not exist; download the checkpoint's missing file"):
        _ = Checkpoint(folder).tensors


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = write(tmp_path / "x.safetensors", GOOD)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{path}.*download (it|the file) again"):
        read_header(path)


def test_a_file_longer_than_its_header_says_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, num_data_bytes=33)
    with pytest.raises(InputError, match="longer than it says"):
        read_header(path)


def test_a_header_size_beyond_the_file_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + bytes(100))
    with pytest.raises(InputError, match="its header says it is 9,223,372,036,854,775,808 bytes long"):
        read_header(path)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    values = torch.arange(6, dtype=torch.float32)

    def content(out: Any) -> None:
        write_header(out, [("one", "F32", (2, 3), 24), ("zwei.\u00e4", "F32", (), 4)], {"format": "pt"})
        out.write(values.numpy().tobytes())
        out.write(values[3:4].numpy().tobytes())

    write_file(path, content)
    found = load_file(path)
    assert torch.equal(found["one"], values.view(2, 3))
    assert found["zwei.\u00e4"].item() == 3
    assert (path.stat().st_size - 28) % 8 == 0, "the data begins at a multiple of 8"


def test_our_header_is_the_librarys_byte_for_byte(tmp_path: Path) -> None:
    tensors = {name: torch.randn(3, 4) for name in ("model.b", "model.a", "model.c.weight")}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    entries = read_header(tmp_path / "theirs").entries
    header = [(e.name, e.dtype, e.shape, e.num_bytes) for e in entries]
    write_file(tmp_path / "ours", lambda out: write_header(out, header, {"format": "pt"}))
    assert (tmp_path / "theirs").read_bytes().startswith((tmp_path / "ours").read_bytes())


def folder_with(tmp_path: Path, weight_map: Mapping[str, Any] | None, files: Mapping[str, Mapping[str, Any]]) -> Path:
    for name, fields in files.items():
        write(tmp_path / name, fields, num_data_bytes=max(e["data_offsets"][1] for e in fields.values()))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    if weight_map is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


ONE = {"a": GOOD["a"]}
BAD_FOLDERS: dict[str, tuple[Mapping[str, Any] | None, Mapping[str, Any], str]] = {
    "above": ({"a": "../1.safetensors"}, {}, "tensor a is said to lie in '../1.safetensors'; only files in the folder itself"),
    "elsewhere": ({"a": "/etc/passwd"}, {}, "tensor a is said to lie in '/etc/passwd'"),
    "below": ({"a": "sub/1.safetensors"}, {}, "only files in the folder itself"),
    "backslash": ({"a": "..\\1.safetensors"}, {}, "only files in the folder itself"),
    "not a name": ({"a": 3}, {}, "only files in the folder itself"),
    "not safetensors": ({"a": "1.bin"}, {}, "which is not a safetensors file"),
    "empty map": ({}, {}, "has no weight_map"),
    "missing shard": ({"a": "1.safetensors"}, {}, "1.safetensors does not exist"),
    "another tensor": (
        {"z": "1.safetensors"},
        {"1.safetensors": ONE},
        "puts tensor z in 1.safetensors, which does not hold it",
    ),
    "twice": (
        {"a": "1.safetensors", "b": "2.safetensors"},
        {"1.safetensors": ONE, "2.safetensors": {**ONE, "b": GOOD["b"]}},
        "the same tensor name stands in several",
    ),
    "no weights": (None, {}, "has neither model.safetensors.index.json nor model.safetensors"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_whose_index_and_files_disagree_is_refused(tmp_path: Path, case: str) -> None:
    weight_map, files, message = BAD_FOLDERS[case]
    folder = folder_with(tmp_path, weight_map, files)
    with pytest.raises(InputError, match=re.escape(message)):
        _ = Checkpoint(folder).tensors


def test_pickled_weights_are_refused_and_not_read(tmp_path: Path) -> None:
    (folder_with(tmp_path, None, {}) / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*can run code when read; convert them to safetensors"):
        _ = Checkpoint(tmp_path).tensors


def test_weights_without_any_tensor_are_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, None, {})
    write(tmp_path / "model.safetensors", {}, num_data_bytes=0)
    with pytest.raises(InputError, match="holds no tensor"):
        _ = Checkpoint(tmp_path).tensors
