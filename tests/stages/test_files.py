"""A file appears whole or not at all."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from stages.io.files import DigestingFile, copy_file, link_or_copy, write_bytes, write_file, write_json


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_size_and_digest_are_those_of_the_bytes(tmp_path: Path) -> None:
    written = write_file(tmp_path / "deep" / "x", lambda out: [out.write(b"abc"), out.write(memoryview(b"defg"))])
    assert (tmp_path / "deep" / "x").read_bytes() == b"abcdefg"
    assert written.num_bytes == 7
    assert written.sha256 == hashlib.sha256(b"abcdefg").hexdigest()


def test_a_large_write_may_be_followed_by_a_change_of_its_memory(tmp_path: Path) -> None:
    """It is hashed in another thread, which must have ended by then; and sent to the disk in between."""
    pieces = [os.urandom(3 << 20) for _ in range(12)]
    memory = bytearray(3 << 20)

    def content(out: DigestingFile) -> None:
        for piece in pieces:
            memory[:] = piece
            out.write(memoryview(memory))
            out.write(b"small")

    written = write_file(tmp_path / "x", content)
    due = b"".join(piece + b"small" for piece in pieces)
    assert (tmp_path / "x").read_bytes() == due
    assert (written.num_bytes, written.sha256) == (len(due), hashlib.sha256(due).hexdigest())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sha256")]


def test_the_name_appears_only_when_all_bytes_are_written(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def content(out: DigestingFile) -> None:
        out.write(b"half")
        out.flush()
        seen.append(listed(tmp_path))

    write_file(tmp_path / "x", content)
    (during,) = seen
    assert "x" not in during
    assert listed(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"]
)
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, stop: BaseException) -> None:
    write_bytes(tmp_path / "x", b"old")

    def content(out: DigestingFile) -> None:
        out.write(b"new")
        raise stop

    with pytest.raises(type(stop)):
        write_file(tmp_path / "x", content)
    assert listed(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_disk_that_fails_at_the_flush_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "x", b"new")
    assert listed(tmp_path) == []


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths))[1])
    write_bytes(tmp_path / "x", b"new")
    assert calls == ["fsync", "replace", "fsync"]


def test_json_refuses_numbers_that_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x", {"loss": float("nan")})
    assert listed(tmp_path) == []


def test_copies_and_links_have_the_sources_bytes(tmp_path: Path) -> None:
    source = write_bytes(tmp_path / "a", os.urandom(5_000_000))
    assert copy_file(source.path, tmp_path / "b").sha256 == source.sha256
    link_or_copy(source.path, tmp_path / "c")
    assert (tmp_path / "c").samefile(tmp_path / "a")


def test_where_the_file_system_has_no_links_a_copy_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    write_bytes(tmp_path / "a", b"content")
    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert listed(tmp_path) == ["a", "b"]
