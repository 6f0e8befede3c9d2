"""Paths that may be URLs of object storage (`s3://bucket/run`), behind the interface of pathlib.

A plain path is a `pathlib.Path`. A URL is a `upath.UPath` (universal_pathlib over fsspec), which has the same methods; it is
typed as a Path. An object has no rename, link or append, and appears only when all of it is there: what differs stands in
this module and in `files.py`, everything else is written once.
"""

import contextlib
import functools
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from stages.common.errors import InputError

# Other processes write what this one lists, so no listing is remembered. Writes go by parts of 16 MiB.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "default_block_size": 1 << 24,
        "default_cache_type": "none",
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}},
    }
}
_PARALLEL_BYTES = 1 << 23
"""Size of the ranges that are read side by side."""


def is_url(text: str | Path) -> bool:
    """Whether a path is one of object storage."""
    return "://" in str(text)


def is_remote(path: Path) -> bool:
    """Whether a path that `as_path` made lies on object storage."""
    return not isinstance(path, Path)


def as_path(text: str | Path) -> Path:
    """The path that a text means. Raises InputError for a URL whose file system is not installed or not known."""
    if not isinstance(text, str) or not is_url(text):
        return Path(text) if isinstance(text, str) else text
    scheme = text.partition("://")[0]
    try:
        from upath import UPath

        path = UPath(text.rstrip("/"), use_listings_cache=False, **_OPTIONS.get(scheme, {}))
        _ = path.fs
    except ImportError as e:
        extra = "; pip install 'hcsmoe[s3]'" if scheme == "s3" else "; and universal_pathlib"
        raise InputError(f"{text}: {scheme}:// needs a package that is not installed: {e}{extra}") from e
    except ValueError as e:
        raise InputError(f"{text}: {scheme}:// is not a kind of storage that is known: {e}") from e
    if isinstance(path, Path):
        raise InputError(f"{text}: write a path on this machine without {scheme}://")
    return cast(Path, path)


def absolute(text: str | Path) -> Path:
    """The same place, whatever the current folder is."""
    path = as_path(text)
    return path if is_remote(path) else path.resolve()


def file_system(path: Path) -> tuple[Any, str]:
    """A remote path's fsspec file system, and its name there."""
    return path.fs, path.path  # type: ignore[attr-defined]


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Tell what a store answers as one InputError: no credentials, no bucket, nobody there, no permission."""
    failures: tuple[type[Exception], ...] = (OSError,)
    with contextlib.suppress(ImportError):
        from botocore.exceptions import BotoCoreError, ClientError

        failures = (OSError, BotoCoreError, ClientError)
    try:
        yield
    except failures as e:
        raise InputError(
            f"{path} cannot be reached: {' '.join(str(e).split()) or type(e).__name__}; check the bucket, the endpoint "
            f"(AWS_ENDPOINT_URL) and the credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        ) from e


def check_readable(path: Path) -> None:
    """Raise InputError unless a remote folder's store answers; nothing to do for a local one."""
    if is_remote(path):
        system, name = file_system(path)
        with reported(path):
            system.ls(name.split("/", 1)[0])


def check_writable(path: Path) -> None:
    """Raise InputError unless an object can be written below a remote folder, and deleted; nothing to do for a local one."""
    if is_remote(path):
        probe = path / f".probe-{uuid.uuid4().hex}"
        with reported(path):
            probe.write_bytes(b"")
            probe.unlink()


def create_exclusively(path: Path, data: bytes) -> bool:
    """Write a small remote object unless there is one of this name: False then. One of many that try succeeds."""
    system, name = file_system(path)
    try:
        with system.open(name, "xb") as out:
            out.write(data)
    except FileExistsError:
        return False
    return True


def read_range(path: Path, begin: int, num_bytes: int) -> bytes:
    """Bytes of a file, fewer where it ends early. Of a remote one nothing else is transferred."""
    if not is_remote(path):
        with open(path, "rb") as raw:
            raw.seek(begin)
            return raw.read(num_bytes)
    system, name = file_system(path)
    return bytes(system.cat_file(name, start=begin, end=begin + num_bytes)) if num_bytes else b""


def read_ranges_into(path: Path, begin: int, view: memoryview) -> None:
    """Fill a buffer from a remote file by ranges that are read side by side. Raises EOFError when it ends before."""
    system, name = file_system(path)
    starts = range(0, view.nbytes, _PARALLEL_BYTES)
    ends = [min(start + _PARALLEL_BYTES, view.nbytes) for start in starts]
    pieces = system.cat_ranges(
        [name] * len(starts), [begin + start for start in starts], [begin + end for end in ends], on_error="return"
    )
    for start, end, piece in zip(starts, ends, pieces, strict=True):
        if isinstance(piece, Exception):
            raise EOFError(f"{path} cannot be read from byte {begin + start:,} on: {piece}") from piece
        if len(piece) != end - start:
            raise EOFError(f"{path} ends at byte {begin + start + len(piece):,} where {begin + view.nbytes:,} is due")
        view[start:end] = piece


def remove_tree(folder: Path) -> None:
    """Remove a folder and what is in it; one that is not there is fine."""
    if not is_remote(folder):
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        return
    system, name = file_system(folder)
    with contextlib.suppress(FileNotFoundError):
        system.rm(name, recursive=True)


@functools.lru_cache(maxsize=1)
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hcsmoe-side-files-")


def local_copies(files: list[Path], folder: Path) -> Path:
    """A local folder with copies of a remote folder's small files, made once per process: for libraries that read only local
    ones."""
    local = Path(_scratch().name) / folder.as_posix().replace("://", "/").strip("/")
    local.mkdir(parents=True, exist_ok=True)
    for file in files:
        (local / file.name).write_bytes(file.read_bytes())
    return local
