"""How files come to be: under a temporary name, flushed to disk, then renamed. Nothing else in the project writes a file."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY_PREFIX = ".tmp-"
_READ_BYTES = 1 << 24


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its path, size in bytes and SHA-256 in hex."""

    path: Path
    num_bytes: int
    sha256: str


class DigestingFile:
    """A binary file that hashes and counts what is written to it, so that no file is read back for its digest."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self.closed = False

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; any contiguous buffer will do."""
        view = memoryview(data).cast("B")
        self._raw.write(view)
        self._hash.update(view)
        self.num_bytes += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        self._raw.flush()

    def sha256(self) -> str:
        """Return the digest of all bytes so far, in hex."""
        return self._hash.hexdigest()


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{path.name}")
    try:
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, write: Callable[[DigestingFile], object]) -> WrittenFile:
    """Let `write` produce the file's bytes; the name appears only when all of them are on disk.

    Raises OSError as the file system does (disk full, read-only); the temporary file is removed then.
    """
    with _temporary(path) as temporary:
        with open(temporary, "wb") as raw:
            out = DigestingFile(raw)
            write(out)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    _sync_folder(path.parent)
    return WrittenFile(path, out.num_bytes, out.sha256())


def write_bytes(path: Path, data: bytes) -> WrittenFile:
    """Write a small file whole."""
    return write_file(path, lambda out: out.write(data))


def write_json(path: Path, value: Any) -> WrittenFile:
    """Write a JSON file, indented, keys in the caller's order; NaN and infinity are refused with ValueError."""
    return write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def copy_file(source: Path, path: Path) -> WrittenFile:
    """Copy a file byte for byte."""

    def copy(out: DigestingFile) -> None:
        with open(source, "rb") as raw:
            while chunk := raw.read(_READ_BYTES):
                out.write(chunk)

    return write_file(path, copy)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a finished file a second name by a hard link, or copy it where the file system has no links."""
    with _temporary(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, path)
        temporary.unlink(missing_ok=True)  # renaming onto another link of the same file does nothing
    _sync_folder(path.parent)


def read_into(path: Path, begin: int, view: memoryview) -> None:
    """Fill a writable buffer of bytes from a file, from byte `begin` on: no copy in between, whatever its size.

    Raises EOFError when the file ends before the buffer is full.
    """
    with open(path, "rb", buffering=0) as raw:
        raw.seek(begin)
        num_read = 0
        while num_read < view.nbytes:
            count = raw.readinto(view[num_read : num_read + _READ_BYTES])
            if not count:
                raise EOFError(f"{path} ends at byte {begin + num_read:,} where {begin + view.nbytes:,} is due")
            num_read += count


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with open(path, "rb") as raw:
        return hashlib.file_digest(raw, "sha256").hexdigest()
