"""Damaged and huge texts: one line that says file and place in it, in bounded time and memory."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.contracts.errors import InputError
from stages.prepare import documents
from stages.prepare.documents import read_documents, seeded_order
from stages.prepare.lines import PIECE_BYTES
from tests.conftest import REPOSITORY
from tests.stages.texts import COMPRESS, drawn, json_line

GOOD = json_line("house").encode()
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "a line that is not JSON": (
        "x.jsonl",
        b"\n{not json\n",
        ", line 2 is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1); write one",
    ),
    "a list for a line": ("x.jsonl", b"[1, 2]\n", ", line 1 is not an object but of type list; write one object a line"),
    "a number for an element": ("x.json", b"[1, 2]\n", ", element 1 is not an object but of type int; write one object a line"),
    "no field": (
        "x.jsonl", b'{"body": "a", "id": 1}',
        ", line 1 has no field 'text'; it has body, id: set calibration.text_field",
    ),
    "null": ("x.jsonl", b'{"text": null}', ", line 1: field 'text' holds null; a text is needed: set calibration.text_field"),
    "an object for a text": (
        "x.jsonl",
        b'{"text": {"a": 1}}',
        ", line 1: field 'text' holds a value of type dict; a text is needed: set calibration.text_field",
    ),
    "half a pair": ("x.jsonl", b'{"text": "a\\ud800"}', ", line 1: character 2 is half of a surrogate pair, which is no text"),
    "nested without end": ("x.jsonl", b'{"text": ' + b"[" * 10**6, ", line 1 is nested too deeply"),
    "a list without end": ("x.json", b"[" * 10**6, ", the list is nested too deeply"),
    "UTF-16 JSON": ("x.jsonl", '{"text": "a"}'.encode("utf-16"), ", line 1: byte 1 is not UTF-8; convert the file to UTF-8"),
    "UTF-16 text": (
        "x.txt", "words".encode("utf-16"),
        " holds a zero at byte 4: it is binary, or text in UTF-16; convert it to UTF-8",
    ),
    "Latin-1 text": ("x.txt", "caf\xe9".encode("latin-1"), ", from byte 1 on: byte 4 is not UTF-8; convert the file to UTF-8"),
    "a long line": (
        "x.jsonl", GOOD + b" " * (1 << 26) + b"  ",
        ", line 2 has more than 67,108,864 bytes; write one document a line, and split longer ones",
    ),
    "a long list": (
        "x.json", b"[" + b" " * (1 << 26),
        " is one list of more than 67,108,864 bytes; write one object a line (.jsonl)",
    ),
    "no parquet": ("x.parquet", b"PAR1 this is nothing PAR1", " cannot be read: "),
    "no gzip": (
        "x.jsonl.gz", b"plain text",
        " cannot be read: Not a gzipped file (b'pl'); it may be damaged or not what its name says",
    ),
    "half a gzip": (
        "x.txt.gz", COMPRESS[".gz"](GOOD * 100)[:-20],
        " cannot be read: Compressed file ended before the end-of-stream marker was reached; it may",
    ),
    "no zstd": ("x.jsonl.zst", b"plain text", " cannot be read: ZSTD decompress failed: Unknown frame descriptor; it may"),
    "half a zstd": ("x.jsonl.zst", COMPRESS[".zst"](GOOD * 100)[:-20], " cannot be read: Truncated compressed stream; it may"),
    "no xz": ("x.txt.xz", b"plain text", " cannot be read: Input format not supported by decoder; it may"),
    "no bz2": ("x.txt.bz2", b"plain text", " cannot be read: Invalid data stream; it may"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_text_is_one_line_with_its_place(case: str, tmp_path: Path) -> None:
    name, content, says = DAMAGED[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        drawn(path)
    assert str(raised.value).startswith(f"calibration.data: {path}{says}")
    assert "\n" not in str(raised.value)


def test_a_parquet_file_without_the_field_or_with_nulls_or_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for table, says in (
        ({"body": ["a"], "id": [1]}, " has no field 'text'; it has body, id: set calibration.text_field"),
        ({"text": [1]}, ": field 'text' holds values of type int64; a text is needed: set calibration.text_field"),
        (
            {"text": pa.array([None], pa.string())},
            ", row 1: field 'text' holds null; a text is needed: set calibration.text_field",
        ),
        ({"text": [b"\xff"]}, ", row 1: byte 1 is not UTF-8; convert the file to UTF-8"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(InputError) as raised:
            drawn(path)
        assert str(raised.value) == f"calibration.data: {path}{says}"


def test_a_parquet_file_with_damaged_pages_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"{number} words" for number in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        drawn(path)
    assert str(raised.value).startswith(f"calibration.data: {path} cannot be read: ")
    assert "\n" not in str(raised.value)


MEASURE = """
import resource, sys, time
from pathlib import Path
from tests.stages.texts import drawn
small, *paths = map(Path, sys.argv[1:])
drawn(small)
for path in paths:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    drawn(path, num_sequences=4, sequence_length=64)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.process_time() - start)
"""


def test_a_long_document_costs_little_memory_and_time(tmp_path: Path) -> None:
    """60 MB for 256 tokens, in a process of its own. Text is read by pieces; a line of JSON or a value of Parquet whole."""
    text = "The river runs past the old house. " * (60_000_000 // 35)
    small, *paths = [tmp_path / name for name in ("small.txt", "x.txt", "x.jsonl", "x.jsonl.gz", "x.parquet")]
    small.write_text(text[:10_000])
    paths[0].write_text(text)
    data = json.dumps({"text": text}).encode()
    paths[1].write_bytes(data)
    paths[2].write_bytes(COMPRESS[".gz"](data))
    pq.write_table(pa.table({"text": [text]}), paths[3])
    command = [sys.executable, "-c", MEASURE, *map(str, (small, *paths))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True)
    measured = [tuple(map(float, line.split())) for line in done.stdout.splitlines()[-4:]]
    assert measured[0][0] < 32
    assert sum(memory_mib for memory_mib, _ in measured) < 400
    assert all(cpu_s < 5 for _, cpu_s in measured)


def test_a_large_text_file_is_several_documents_cut_at_line_ends(tmp_path: Path) -> None:
    lines = [f"line {number} with an \xe9\n" for number in range(200_000)]
    (tmp_path / "x.txt").write_text("".join(lines))
    pieces = list(read_documents([tmp_path / "x.txt"], "text", 0, 1 << 30, "here"))
    assert len(pieces) == -(-(tmp_path / "x.txt").stat().st_size // PIECE_BYTES)
    assert all(piece.endswith("\n") and len(piece.encode()) <= PIECE_BYTES for piece in pieces)
    assert sorted("".join(pieces).splitlines(keepends=True)) == sorted(lines)
    (tmp_path / "y.txt").write_text("\xe9" * PIECE_BYTES)
    assert "".join(read_documents([tmp_path / "y.txt"], "text", 0, 1 << 30, "here")) == "\xe9" * PIECE_BYTES


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_documents_come_once_each_in_the_order_of_a_seeded_permutation(kind: str, tmp_path: Path) -> None:
    """However the passes over the files are cut: documents of very different lengths make many."""
    texts = [f"{number} " * (1 + number % 7 * 40) for number in range(500)]
    paths = []
    for part, begin in enumerate(range(0, 500, 125)):
        path, rows = tmp_path / f"{part}.{kind}", texts[begin : begin + 125]
        if kind == "parquet":
            pq.write_table(pa.table({"text": rows}), path, row_group_size=40)
        else:
            data = "".join(json.dumps({"text": text}) + "\n" for text in rows).encode()
            path.write_bytes(COMPRESS[".gz"](data) if kind.endswith("gz") else data)
        paths.append(path)
    for seed in (0, 1):
        expected = [texts[number][:100] for number in seeded_order(500, seed)]
        assert list(read_documents(paths, "text", seed, 100, "here")) == expected
    assert seeded_order(500, 0).tolist() != seeded_order(500, 1).tolist()


def test_an_even_reading_cuts_long_texts_so_that_many_find_room(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    long = [" ".join(f"{number}-{word}" for word in range(400)) for number in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in long))

    def read(seed: int, num_even: int) -> list[str]:
        return [str(text) for text in read_documents([path], "text", seed, 1000, "here", num_even=num_even)]

    order, pieces = seeded_order(20, 0), read(0, 10)
    assert [len(piece) for piece in pieces] == [2 * 1000 // 10] * 20
    assert all(piece in long[number] for number, piece in zip(order, pieces, strict=True))
    assert len([number for number, piece in zip(order, pieces, strict=True) if not long[number].startswith(piece)]) > 15
    assert pieces == read(0, 10)
    assert [len(piece) for piece in read(0, 100)] == [2 * 1000 // 20] * 20, "there are no more than twenty"
    assert [len(piece) for piece in read(0, 1)] == [1000] * 20


def test_the_order_of_very_many_documents_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_ORDERED", 1000)
    order_D = seeded_order(1_500, 0)
    assert sorted(order_D) == [number for number in range(1_500) if number % 3 != 2]
