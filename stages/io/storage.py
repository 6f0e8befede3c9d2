"""Paths that may be URLs of object storage (`s3://bucket/run`), with the interface of pathlib.

A plain path is a `pathlib.Path`. A URL is a `upath.UPath` (universal_pathlib over fsspec), which has the same methods and is
typed as a Path. An object cannot be renamed, linked or appended to, and appears only when it is complete. Only this module and
`files.py` handle these differences; all other code is the same for both.
"""

import contextlib
import errno
import shutil
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

from stages.contracts.errors import InputError

# Listings are not cached, because other processes write the files that this one lists. Writes use parts of 16 MiB.
_OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "default_block_size": 1 << 24,
        "default_cache_type": "none",
        "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}},
    }
}
STORES = ("s3", "gs", "gcs", "abfs", "abfss", "az", "oss")
"""Schemes of object stores that many hosts can write to. fsspec also knows archives, web sites and this process's memory."""
_PARALLEL_BYTES = 1 << 23
"""Size of the ranges that are read in parallel."""
_NUM_PARALLEL = 16
"""Maximum number of ranges in flight. It bounds the extra memory of a read, however large the tensor is."""

_CONFLICT_WAITS_S = (0.1, 0.4, 1.6)

# Only Linux defines EREMOTEIO.
_PASSING_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "EREMOTEIO", "ESTALE", "ETIMEDOUT", "ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EPIPE", "ENOTCONN",
        "ESHUTDOWN", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH",
    )
    if hasattr(errno, name)
)  # fmt: skip
_PASSING_ERRORS = {
    "botocore.exceptions": ("ConnectionError", "HTTPClientError", "IncompleteReadError"),
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "http.client": ("IncompleteRead",),
    "httpx": ("TransportError",),
    "requests": ("ConnectionError", "Timeout"),
}
"""Exceptions that storage libraries raise for a failed connection, by module."""
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_PASSING_CODES = ("SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "OperationAborted")
_REMEDIES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there or raise the quota",
    errno.EACCES: "let the user of the workers read and write there",
    errno.EPERM: "let the user of the workers read and write there",
    errno.EFBIG: "use a file system that holds files of this size",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EROFS: "mount it so that it can be written to",
}


def is_url(text: str | Path) -> bool:
    """Whether a path is a URL of object storage."""
    return "://" in str(text)


def is_remote(path: Path) -> bool:
    """Whether a path made by `as_path` is on object storage."""
    return not isinstance(path, Path)


def as_path(text: str | Path) -> Path:
    """The path that a text denotes. Raises InputError for a null character, and for a URL of an unknown kind of storage or one
    whose package is not installed."""
    if "\0" in str(text):
        raise InputError(f"{str(text)!r} holds a null character, which no path can have; remove it")
    if not isinstance(text, str) or not is_url(text):
        return Path(text) if isinstance(text, str) else text
    scheme, _, place = text.partition("://")
    if scheme in ("file", "local"):
        raise InputError(f"{text}: write a path on this machine without {scheme}://")
    if scheme not in STORES:
        raise InputError(f"{text}: {scheme}:// is not a kind of storage that is known; known: {', '.join(STORES)}")
    if not place.strip("/"):
        raise InputError(f"{text}: names no bucket; write for example {scheme}://bucket/run")
    try:
        from upath import UPath

        path = UPath(text.rstrip("/"), use_listings_cache=False, **_OPTIONS.get(scheme, {}))
        _ = path.fs
    except ImportError as e:
        extra = "; install it with pip install 'hcsmoe[s3]'" if scheme == "s3" else "; install it and universal_pathlib"
        raise InputError(f"{text}: {scheme}:// needs a package that is not installed: {e}{extra}") from e
    except ValueError as e:
        raise InputError(f"{text}: this URL cannot be used: {e}; correct it, or write a path") from e
    return cast(Path, path)


def absolute(text: str | Path) -> Path:
    """The absolute path. Raises InputError for symbolic links that form a circle."""
    path = as_path(text)
    if is_remote(path):
        return path
    try:
        return path.resolve()
    except (OSError, RuntimeError) as e:  # the type depends on the version of Python
        raise InputError(
            f"{path} cannot be followed: {e}; its links lead in a circle, or a name is too long: give another path"
        ) from e


def file_system(path: Path) -> tuple[Any, str]:
    """fsspec file system of a remote path, and the path's name in it."""
    return path.fs, path.path  # type: ignore[attr-defined]


def failures() -> tuple[type[Exception], ...]:
    """Exceptions that a file system or a store may raise.
    A separate list, because a connection error of a store is not an OSError."""
    if "botocore" not in sys.modules:  # no store has been used
        return (OSError,)
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, BotoCoreError, ClientError)


_OUTSIDE = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENAMETOOLONG,
    errno.ENFILE, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EPERM, errno.EROFS,
    errno.ESTALE,
}  # fmt: skip


def is_outside(error: BaseException) -> bool:
    """Whether a failure has a cause outside this program: an answer of the store, or an error of the file system that names a
    file (permissions, a full disk, a missing path)."""
    if not isinstance(error, failures()):
        return False
    if isinstance(error, OSError) and not isinstance(error.__cause__, failures()):
        return error.errno in _OUTSIDE and error.filename is not None
    return True


def is_passing(error: BaseException) -> bool:
    """Whether the cause of an error may go away by itself: a file server or a store that is down, slow or asks to slow down.

    Chained causes are examined, too. A store's own answer counts more than the exception that a library made of it. A full
    disk, a missing file and a missing permission do not go away.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__
    for cause in causes:
        answer = getattr(cause, "response", None)
        if isinstance(answer, dict) and "Error" in answer:
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status in _PASSING_STATUS or answer["Error"].get("Code") in _PASSING_CODES
    return any(_passes(cause) for cause in causes)


def _passes(error: BaseException) -> bool:
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, OSError) and error.errno in _PASSING_ERRNOS):
        return True
    known = ((sys.modules.get(module), names) for module, names in _PASSING_ERRORS.items())
    return any(isinstance(error, getattr(module, name)) for module, names in known if module for name in names)


def remedy_for(error: BaseException) -> str | None:
    """Advice for an error of the machine (disk full, no permission); None for any other error."""
    if isinstance(error, PermissionError) and error.errno is None:  # raised for a store's answer
        return _REMEDIES[errno.EACCES]
    return _REMEDIES.get(error.errno) if isinstance(error, OSError) and error.errno is not None else None


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Raise a store's errors as one InputError: no credentials, no bucket, no connection, no permission."""
    try:
        yield
    except failures() as e:
        raise InputError(
            f"{path} cannot be reached: {' '.join(str(e).split()) or type(e).__name__}; check the bucket, the endpoint "
            f"(AWS_ENDPOINT_URL) and the credentials (AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        ) from e


def check_readable(path: Path) -> None:
    """Raise InputError unless the store of a remote folder answers. Does nothing for a local folder.

    Does not check that the folder exists. Lists nothing outside the folder, because an access policy may forbid it.
    """
    if is_remote(path):
        system, name = file_system(path)
        with reported(path):
            try:
                system.info(name)
            except FileNotFoundError as e:
                if e.__cause__ is not None:  # the store answered, for example that the bucket is missing
                    raise


def check_writable(path: Path) -> None:
    """Raise InputError unless an object below a remote folder can be written and deleted. Does nothing for a local folder."""
    if is_remote(path):
        probe = path / f".probe-{uuid.uuid4().hex}"
        with reported(path):
            probe.write_bytes(b"")
            probe.unlink()


def create_exclusively(path: Path, data: bytes) -> bool:
    """Write a small remote object if none has this name; else return False. Of several concurrent writers, one succeeds.

    S3 may answer 409 to simultaneous writes of one name and asks for a retry.
    """
    system, name = file_system(path)
    for wait_s in (*_CONFLICT_WAITS_S, None):
        try:
            with system.open(name, "xb") as out:
                out.write(data)
        except FileExistsError:
            return False
        except OSError as e:
            if wait_s is None or not _is_conflict(e):
                raise
            time.sleep(wait_s)
        else:
            return True
    raise AssertionError("the last try returns or raises")


def _is_conflict(error: OSError) -> bool:
    answer = getattr(error.__cause__, "response", {})
    return bool(answer.get("Error", {}).get("Code") == "ConditionalRequestConflict")


def entity_tag(path: Path) -> str | None:
    """S3's entity tag of an object's present content; None for a store without such tags."""
    system, name = file_system(path)
    tag = system.info(name).get("ETag")
    return None if tag is None else str(tag)


def entity_tags(folder: Path) -> dict[str, str]:
    """Entity tags of the objects in a remote folder by name, from a single listing; empty for a store without such tags."""
    system, name = file_system(folder)
    listed = ((PurePosixPath(found["name"]).name, found.get("ETag")) for found in system.ls(name, detail=True))
    return {name: str(tag) for name, tag in listed if tag is not None}


def replace_if_unchanged(path: Path, data: bytes, tag: str | None) -> None:
    """Overwrite a small remote object if it still has this entity tag. Raises OSError if it has another one."""
    system, name = file_system(path)
    system.pipe_file(name, data, **({} if tag is None else {"IfMatch": tag}))


def read_range(path: Path, begin: int, num_bytes: int) -> bytes:
    """A range of bytes of a file; fewer where the file ends. Only this range of a remote file is transferred."""
    if not is_remote(path):
        with open(path, "rb") as raw:
            raw.seek(begin)
            return raw.read(num_bytes)
    system, name = file_system(path)
    return bytes(system.cat_file(name, start=begin, end=begin + num_bytes)) if num_bytes else b""


def read_start(path: Path, max_bytes: int) -> bytes:
    """The first bytes of a remote file, all if it has no more, in one request. Raises FileNotFoundError when there is none."""
    system, name = file_system(path)
    try:
        return bytes(system.cat_file(name, start=0, end=max_bytes))
    except OSError as e:
        if isinstance(e, FileNotFoundError) or system.size(name):
            raise
        return b""  # stores refuse any range of an empty object


def read_ranges_into(path: Path, begin: int, view: memoryview) -> None:
    """Fill a buffer from a remote file, reading several ranges in parallel.

    Raises EOFError when the file is too short, and otherwise the store's own error.
    """
    system, name = file_system(path)
    all_starts = range(0, view.nbytes, _PARALLEL_BYTES)
    for first in range(0, len(all_starts), _NUM_PARALLEL):
        starts = all_starts[first : first + _NUM_PARALLEL]
        ends = [min(start + _PARALLEL_BYTES, view.nbytes) for start in starts]
        pieces = system.cat_ranges(
            [name] * len(starts), [begin + start for start in starts], [begin + end for end in ends], on_error="return"
        )
        for start, end, piece in zip(starts, ends, pieces, strict=True):
            if isinstance(piece, Exception) or len(piece) != end - start:
                file_bytes = system.size(name)
                if file_bytes < begin + end:
                    raise EOFError(f"{path} ends at byte {file_bytes:,} instead of {begin + view.nbytes:,} or later")
                if isinstance(piece, Exception):
                    raise piece
                short = f"{len(piece):,} of {end - start:,} bytes came from byte {begin + start:,} on"
                raise OSError(errno.EIO, short, str(path))
            view[start:end] = piece


def remove_tree(folder: Path, is_strict: bool = False) -> None:
    """Remove a folder and its content. A missing folder is no error. Symbolic links are not followed.

    is_strict: raise OSError if anything cannot be removed. Otherwise such files are left in place, since a worker that was
    given up may still be writing to the folder.
    """
    if not is_remote(folder):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder, ignore_errors=not is_strict)
        return
    system, name = file_system(folder)
    with contextlib.suppress(FileNotFoundError):
        system.rm(name, recursive=True)


def local_copies(folder: Path, names: list[str], owner: object) -> Path:
    """A local folder with copies of small files of a remote one, for libraries that read only local files. It is removed
    together with `owner`.

    Each owner gets its own copies, because another thread may be reading the same files.
    """
    local = Path(tempfile.mkdtemp(prefix="hcsmoe-side-files-"))
    weakref.finalize(owner, shutil.rmtree, local, ignore_errors=True)
    for name in names:
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes((folder / name).read_bytes())
    return local
