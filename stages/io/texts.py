"""Lists, checks and opens the files of a text. Imports nothing heavy, because the driver uses it too."""

import bz2
import gzip
import io
import lzma
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.contracts.errors import InputError
from stages.io.storage import is_url
from stages.io.untrusted import check_regular

KINDS = {
    ".txt": "text", ".text": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet",
    ".npy": "ids", ".safetensors": "ids",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
KNOWN = f"{', '.join(KINDS)}; .txt, .text, .json and .jsonl also with {', '.join(COMPRESSED)} behind"
_HIDDEN = (".", "_")


@dataclass(frozen=True)
class TextFile:
    """A file of a text. name: identifies it within the text: its own name, or its path in the given folder."""

    path: Path
    name: str


def kind_of(name: str) -> str | None:
    """Kind of a file by its name: text, json, parquet or ids; None for a name of no supported kind."""
    kind = KINDS.get(content_suffix(name))
    is_compressed = name.lower().endswith(COMPRESSED)
    return None if is_compressed and kind not in ("text", "json") else kind


def content_suffix(name: str) -> str:
    """Suffix of the decompressed content: `.json` for `c4.JSON.gz`."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix


def list_files(data: Sequence[str], place: str) -> list[TextFile]:
    """Files of a text: named files in their order, and all files below each named folder in order of their paths.

    In folders, names that begin with `.` or `_` are skipped. Raises InputError for a missing name, for a file that is not
    regular or not readable, for a file named twice, and for files of several kinds or an unknown one.
    """
    files: list[TextFile] = []
    for name in data:
        if is_url(name):
            raise InputError(f"{place}.data: {name} is a URL; texts are read from files that every node reaches: copy it")
        path = Path(name).expanduser()
        files += _below(path, place) if stat.S_ISDIR(_mode(path, place)) else [TextFile(path, path.name)]
    seen: set[Path] = set()
    for file in files:
        _check_file(file.path, place)
        path = file.path.parent.resolve() / file.path.name  # keep a link's own name: two may share a target
        if path in seen:
            raise InputError(f"{place}.data names {path} twice; name each file once")
        seen.add(path)
    _check_kinds(files, place)
    return files


def _mode(path: Path, place: str) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as e:
        if path.is_symlink():
            raise InputError(
                f"{place}.data: {path} is a link to {path.readlink()}, which does not exist; replace the link, "
                f"or name another file"
            ) from e
        raise InputError(
            f"{place}.data: {path} does not exist; give a file, or a dataset of the hub as org/name[:split]"
        ) from e
    except (OSError, ValueError) as e:  # no permission, or a name that is too long or has a zero byte
        raise InputError(
            f"{place}.data: {path} cannot be read: {getattr(e, 'strerror', None) or e}; change its "
            f"permissions, or name another file"
        ) from e


def _check_file(path: Path, place: str) -> None:
    _mode(path, place)
    try:
        check_regular(path)
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    except InputError as e:
        raise InputError(f"{place}.data: {e}") from e
    except OSError as e:
        raise InputError(
            f"{place}.data: {path} cannot be read: {e.strerror}; change its permissions, or name another file"
        ) from e


def _below(folder: Path, place: str) -> Iterator[TextFile]:
    found: list[TextFile] = []

    def refuse(error: OSError) -> None:
        raise InputError(
            f"{place}.data: {error.filename} cannot be read: {error.strerror}; change its permissions, or name another file"
        ) from error

    for parent, subfolders, names in os.walk(folder, onerror=refuse):
        for name in subfolders:
            if not name.startswith(_HIDDEN) and (Path(parent) / name).is_symlink():
                raise InputError(
                    f"{place}.data: {Path(parent) / name} is a link to a folder, which is not followed; name that folder"
                )
        subfolders[:] = [name for name in subfolders if not name.startswith(_HIDDEN)]
        paths = [Path(parent) / name for name in names if not name.startswith(_HIDDEN)]
        found += [TextFile(path, path.relative_to(folder).as_posix()) for path in paths]
    if not found:
        raise InputError(
            f"{place}.data: {folder} is a folder without files (names that begin with . or _ do not count); "
            f"put files there, or name another folder"
        )
    yield from sorted(found, key=lambda file: file.name)


def _check_kinds(files: Sequence[TextFile], place: str) -> None:
    first: dict[str, TextFile] = {}
    for file in files:
        kind = kind_of(file.path.name)
        if kind is None:
            raise InputError(f"{place}.data: {file.path} is of a kind that is not read; known: {KNOWN}")
        first.setdefault(kind, file)
    if len(first) > 1:
        found = " and ".join(str(file.path) for file in first.values())
        raise InputError(f"{place}.data: {found} are of different kinds; name files of one kind")
    if "ids" in first and len(files) > 1:
        raise InputError(f"{place}.data names {len(files)} files of token ids; give one file")


def open_text(path: Path) -> io.BufferedIOBase:
    """The content of a file, decompressed if its name has a compression suffix."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst":
            return _open_zstd(path)
    return open(path, "rb")


def _open_zstd(path: Path) -> io.BufferedIOBase:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), 1 << 20)
