"""Reads documents of text and JSON files, compressed or not. Only one document is in memory at a time, never a whole file."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from stages.io.texts import content_suffix, open_text
from stages.prepare.reading import Document, Reader, Size

MAX_LINE_BYTES = 1 << 26
"""Maximum size of a JSON line, and of a JSON file that is a single list, because these are parsed in one piece."""
PIECE_BYTES = 1 << 20
"""Maximum size of a document in a text file. A larger file is cut into several documents."""
_START_BYTES = 1 << 12
_BOM = b"\xef\xbb\xbf"


class JsonReader(Reader):
    """One object per line, skipping empty lines; or, in a `.json` file, a single list of objects."""

    def measure(self) -> Size:
        """Count lines without parsing them."""
        objects = self._list()
        if objects is not None:
            return Size(len(objects), MAX_LINE_BYTES)
        num_documents = num_bytes = 0
        for _, line in self._lines():
            num_documents += 1
            num_bytes += len(line)
        return Size(num_documents, num_bytes)

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Document]]:
        """Parse the wanted lines."""
        objects = self._list()
        if objects is not None:
            yield from ((number, self._document(objects[number], f"element {number + 1:,}")) for number in wanted)
            return
        left = iter(wanted)
        next_wanted = next(left, None)
        for number, (line_number, line) in enumerate(self._lines()):
            if number == next_wanted:
                where = f"line {line_number:,}"
                yield number, self._document(self._parsed(line, where), where)
                next_wanted = next(left, None)
                if next_wanted is None:
                    return

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each line that is not empty."""
        line_number = 0
        with open_text(self.path) as raw:
            while line := raw.readline(MAX_LINE_BYTES + 1):
                line_number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise self.error(
                        f", line {line_number:,} has more than {MAX_LINE_BYTES:,} bytes; write one document a line, and split "
                        f"longer ones"
                    )
                if line_number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield line_number, line

    def _list(self) -> list[Any] | None:
        """Elements of a `.json` file that is a single list; None for any other file."""
        if content_suffix(self.path.name) != ".json":
            return None
        with open_text(self.path) as raw:
            data = raw.read(_START_BYTES)
            if not data.removeprefix(_BOM).lstrip().startswith(b"["):
                return None
            data += raw.read(MAX_LINE_BYTES + 1)
        if len(data) > MAX_LINE_BYTES:
            raise self.error(f" is one list of more than {MAX_LINE_BYTES:,} bytes; write one object a line (.jsonl)")
        objects = self._parsed(data.removeprefix(_BOM), "the list")
        assert isinstance(objects, list)
        return objects

    def _parsed(self, data: bytes, where: str) -> Any:
        try:
            return json.loads(self.decoded(data, where))
        except RecursionError as e:
            raise self.error(f", {where} is nested too deeply; write it with fewer levels") from e
        except json.JSONDecodeError as e:
            raise self.error(f", {where} is not JSON: {e}; write one object a line") from e

    def _document(self, value: Any, where: str) -> Document:
        if not isinstance(value, dict):
            raise self.error(f", {where} is not an object but of type {type(value).__name__}; write one object a line")
        return self.document(value, where)


class TextReader(Reader):
    """A file is one document. A large file is cut at line ends into pieces of at most PIECE_BYTES."""

    def measure(self) -> Size:
        """Count the pieces. Raises InputError where conversations are needed, because a text file holds none."""
        if self.is_chat:
            raise self.error(" is a text file, but format is chat; give .jsonl, .json or .parquet files, or set format to text")
        lengths = [len(piece) for _, piece in self._pieces()]
        return Size(len(lengths), sum(lengths))

    def read(self, wanted: Sequence[int]) -> Iterator[tuple[int, Document]]:
        """Decode the wanted pieces. Line ends become `\\n`."""
        left = set(wanted)
        for number, (begin, piece) in enumerate(self._pieces()):
            if number in left:
                where = f"from byte {begin + 1:,} on"
                if b"\0" in piece:
                    at = begin + piece.index(b"\0") + 1
                    raise self.error(f" holds a zero at byte {at:,}: it is binary, or text in UTF-16; convert it to UTF-8")
                text = self.decoded(piece.removeprefix(_BOM) if begin == 0 else piece, where)
                yield number, text.replace("\r\n", "\n").replace("\r", "\n")
                left.discard(number)
                if not left:
                    return

    def _pieces(self) -> Iterator[tuple[int, bytes]]:
        """Each piece with the position of its first byte."""
        begin, rest = 0, b""
        with open_text(self.path) as raw:
            while piece := rest + raw.read(PIECE_BYTES - len(rest)):
                cut = len(piece) if len(piece) < PIECE_BYTES else _line_end(piece)
                yield begin, piece[:cut]
                begin, rest = begin + cut, piece[cut:]


def _line_end(piece: bytes) -> int:
    """Position at which to cut: after the last line end, or else before the last character, which may be incomplete."""
    cut = piece.rfind(b"\n") + 1
    if cut:
        return cut
    cut = len(piece) - 1
    while cut > len(piece) - 4 and piece[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
