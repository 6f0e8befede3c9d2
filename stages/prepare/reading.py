"""Base class of readers of text files, and their errors."""

import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.contracts.errors import InputError

_FAILURES = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


@dataclass(frozen=True)
class Size:
    """Number of documents in a file, and their decompressed size in bytes."""

    num_documents: int
    num_bytes: int


class Reader(ABC):
    """Reads one file. place: the section of the run file that names it."""

    def __init__(self, path: Path, text_field: str, place: str) -> None:
        self.path, self.text_field, self.place = path, text_field, place

    @abstractmethod
    def measure(self) -> Size:
        """Count the documents without looking at their text."""

    @abstractmethod
    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, str]]:
        """Number and text of each wanted document. wanted: sorted numbers."""

    def error(self, what: str) -> InputError:
        """An InputError that names this file."""
        return InputError(f"{self.place}.data: {self.path}{what}")

    def checked(self, value: Any, where: str) -> str:
        """The text in a field. Raises InputError for another type. where: row, line or element, for the message."""
        if isinstance(value, bytes):
            value = self.decoded(value, where)
        if not isinstance(value, str):
            kind = "null" if value is None else f"a value of type {type(value).__name__}"
            raise self.error(
                f", {where}: field {self.text_field!r} holds {kind}; a text is needed: set {self.place}.text_field"
            )
        try:
            value.encode()
        except UnicodeEncodeError as e:
            raise self.error(f", {where}: character {e.start + 1:,} is half of a surrogate pair, which is no text") from e
        return value

    def decoded(self, data: bytes, where: str) -> str:
        """UTF-8 bytes as text. Raises InputError for other bytes."""
        try:
            return data.decode()
        except UnicodeDecodeError as e:
            raise self.error(f", {where}: byte {e.start + 1:,} is not UTF-8; convert the file to UTF-8") from e

    def missing(self, fields: Sequence[str], where: str = "") -> InputError:
        """The error for a row that lacks the text field."""
        return self.error(
            f"{where} has no field {self.text_field!r}; it has {', '.join(fields) or 'none'}: set {self.place}.text_field"
        )


@contextmanager
def failing(path: Path, place: str) -> Iterator[None]:
    """Raise errors from reading a file as an InputError that names the file."""
    try:
        yield
    except _FAILURES as e:
        reason = " ".join(str(getattr(e, "strerror", None) or e).split())
        raise InputError(f"{place}.data: {path} cannot be read: {reason}; it may be damaged or not what its name says") from e
