"""Which files a text is: exactly those named, of any form that is known, in place, and nothing of them kept."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.contracts.errors import InputError
from stages.io.texts import list_files
from tests import HOME
from tests.stages.texts import COMPRESS, drawn, json_line, words


def test_a_name_is_that_file_and_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "c4[1].jsonl").write_text(json_line("house"))
    (tmp_path / "c41.jsonl").write_text(json_line("water"))
    (tmp_path / "c4*.jsonl").write_text(json_line("river"))
    assert words(tmp_path / "c4[1].jsonl") == {"house"}
    assert words(tmp_path / "c4*.jsonl") == {"river"}


def test_other_content_under_the_same_path_and_time_is_read(tmp_path: Path) -> None:
    path, other = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    path.write_text(json_line("house"))
    other.write_text(json_line("water"))
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    assert words(path) == {"house"}
    shutil.copy2(other, path)
    assert words(path) == {"water"}


def test_nothing_of_a_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json_line("house") * 1000)
    before = {path for path in HOME.rglob("*") if path.is_file()}
    drawn(tmp_path / "x.jsonl")
    assert {path for path in HOME.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".json", ".jsonl"])
def test_compressed_files_are_read(kind: str, suffix: str, tmp_path: Path) -> None:
    content = " house" * 40 if kind == ".txt" else json_line("house")
    path = tmp_path / f"X{kind}{suffix}".upper()
    path.write_bytes(COMPRESS[suffix](content.encode()))
    assert words(path) == {"house"}


def test_a_folder_is_all_its_files_in_order_of_their_paths(tmp_path: Path) -> None:
    folder = tmp_path / "c4"
    for name, word in (
        ("b/1.jsonl", "water"),
        ("a.jsonl", "house"),
        ("b/.hidden.jsonl", "x"),
        ("_logs/z.jsonl", "x"),
        (".git", "x"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json_line(word))
    assert [file.name for file in list_files([str(folder)], "here")] == ["a.jsonl", "b/1.jsonl"]
    by_folder, by_name = drawn(folder, num_sequences=4), drawn([folder / "a.jsonl", folder / "b" / "1.jsonl"], num_sequences=4)
    assert (by_folder == by_name).all()
    assert words(folder, num_sequences=8) == {"house", "water"}


def test_a_list_in_a_json_file_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" + ",\n".join(json_line(word) for word in ("house", "water")) + "]", encoding="utf-8-sig")
    assert words(path, num_sequences=8) == {"house", "water"}
    (tmp_path / "y.jsonl").write_text(json_line("river").strip(), encoding="utf-8-sig")
    assert words(tmp_path / "y.jsonl") == {"river"}


def test_only_the_text_field_of_rows_that_differ_is_read(tmp_path: Path) -> None:
    extras = [{"meta": None}, {"meta": "string"}, {"meta": {"a": [1]}}, {"meta": [1, "b"], "more": {"deep": {}}}, {}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n\n  \n".join(json_line("house", **extra).strip() for extra in extras))
    (tmp_path / "y.jsonl").write_text(json_line("house", meta=1.5))
    assert words([path, tmp_path / "y.jsonl"], num_sequences=10) == {"house"}


TYPES = {
    "string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view(), "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_a_parquet_column_of_any_text_type_is_read_alone(kind: str, tmp_path: Path) -> None:
    texts = pa.array([" house" * 40, " water" * 40] * 300, TYPES[kind] if kind != "dictionary" else pa.string())
    texts = texts.dictionary_encode() if kind == "dictionary" else texts
    other = pa.array([[{"a": 1}]] * 600)
    pq.write_table(pa.table({"other": other, "text": texts}), tmp_path / "x.parquet", row_group_size=250)
    assert words(tmp_path / "x.parquet", num_sequences=16) == {"house", "water"}


def test_line_ends_of_text_files_and_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "unix.txt").write_bytes(b"a b\nc d\n" * 20)
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbf" + b"a b\r\nc d\r\n" * 20)
    assert (drawn(tmp_path / "unix.txt") == drawn(tmp_path / "dos.txt")).all()
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": "  "}\n' * 50 + json_line("house"))
    assert words(tmp_path / "x.jsonl", num_sequences=5) == {"house"}


def test_no_permission_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "x.txt").chmod(0)
    (tmp_path / "inside").mkdir(mode=0)
    if os.geteuid() == 0:
        for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
            parent.chmod(0o755)
        os.seteuid(65534)
    try:
        for name in ("x.txt", "inside", "inside/x.txt"):
            with pytest.raises(InputError) as raised:
                list_files([str(tmp_path / name)], "evaluation")
            where = f"evaluation.data: {tmp_path / name} cannot be read: Permission denied"
            assert str(raised.value) == f"{where}; change its permissions, or name another file"
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.txt")


def mixed(folder: Path) -> None:
    (folder / "x.txt").mkdir()
    (folder / "x.txt" / "a.txt").write_text("a")
    (folder / "x.txt" / "b.jsonl").write_text("b")


def linked_folder(folder: Path) -> None:
    (folder / "x.txt").mkdir()
    (folder / "x.txt" / "in").symlink_to(folder)


def two_ids(folder: Path) -> None:
    (folder / "x.txt").mkdir()
    for name in ("a.npy", "b.npy"):
        (folder / "x.txt" / name).write_bytes(b"")


NAMES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (pipe, "calibration.data: {x} is a pipe, socket or device; a regular file is needed"),
    "a device": (
        lambda folder: (folder / "x.txt").symlink_to("/dev/zero"),
        "calibration.data: {x} is a pipe, socket or device; a regular file is needed",
    ),
    "a link to nothing": (
        lambda folder: (folder / "x.txt").symlink_to("gone"),
        "calibration.data: {x} is a link to gone, which does not exist; replace the link, or name another file",
    ),
    "a link to itself": (
        lambda folder: (folder / "x.txt").symlink_to("x.txt"),
        "calibration.data: {x} cannot be read: Too many levels of symbolic links; change its permissions, or name another file",
    ),
    "nothing": (
        lambda folder: None,
        "calibration.data: {x} does not exist; give a file, or a dataset of the hub as org/name[:split]",
    ),
    "an empty folder": (
        lambda folder: (folder / "x.txt").mkdir(),
        "calibration.data: {x} is a folder without files (names that begin with . or _ do not count); "
        "put files there, or name another folder",
    ),
    "a folder of two kinds": (
        mixed,
        "calibration.data: {x}/a.txt and {x}/b.jsonl are of different kinds; name files of one kind",
    ),
    "a folder with a link to a folder": (
        linked_folder,
        "calibration.data: {x}/in is a link to a folder, which is not followed; name that folder",
    ),
    "two files of ids": (two_ids, "calibration.data names 2 files of token ids; give one file"),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_what_is_no_file_is_one_line_and_nobody_waits(case: str, tmp_path: Path) -> None:
    make, message = NAMES[case]
    make(tmp_path)
    with pytest.raises(InputError) as raised:
        drawn(tmp_path / "x.txt")
    assert str(raised.value) == message.replace("{x}", str(tmp_path / "x.txt"))


def test_a_file_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(InputError, match=r"calibration\.data names .*x\.txt twice; name each file once"):
        drawn([tmp_path / "x.txt", tmp_path])
