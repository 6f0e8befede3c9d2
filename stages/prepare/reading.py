"""Base class of readers of text files, and their errors."""

import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.contracts.errors import InputError
from stages.prepare.chat import Conversation, conversation_of

Document = str | Conversation
_FAILURES = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)


@dataclass(frozen=True)
class Size:
    """Number of documents in a file, and their decompressed size in bytes."""

    num_documents: int
    num_bytes: int


class Reader(ABC):
    """Reads one file. place: where the run file names it. is_chat: whether its documents are conversations, not texts."""

    def __init__(self, path: Path, text_field: str, place: str, is_chat: bool = False) -> None:
        self.path, self.text_field, self.place, self.is_chat = path, text_field, place, is_chat

    @abstractmethod
    def measure(self) -> Size:
        """Count the documents without looking at their text."""

    @abstractmethod
    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Document]]:
        """Number and content of each wanted document. wanted: sorted numbers."""

    def document(self, row: Mapping[str, Any], where: str) -> Document:
        """The document that a row holds. Raises InputError for one that holds none. where: row or line, for the message."""
        if self.is_chat:
            try:
                return conversation_of(row, f"{self.path}, {where}")
            except ValueError as e:
                raise self.error(f", {where}: {e}") from e
        if self.text_field not in row:
            raise self.missing(list(row), f", {where}")
        return self.checked(row[self.text_field], where)

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
            raise self.error(
                f", {where}: character {e.start + 1:,} is half of a surrogate pair, which is no text: remove it"
            ) from e
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
        raise InputError(
            f"{place}.data: {path} cannot be read: {reason}; it may be damaged or not what its name says: "
            f"convert it, or download it again"
        ) from e
