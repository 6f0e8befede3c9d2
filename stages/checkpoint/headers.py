"""Reads and writes safetensors headers without the tensors.

Layout: https://github.com/huggingface/safetensors#format (8 bytes little-endian header size, JSON header, tensor bytes).
Headers are untrusted: every offset is checked against the file size before use, and every size is bounded before it is
multiplied. A file that the safetensors library would reject is rejected here, before a run starts.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.checkpoint.schemes import Scheme
from stages.contracts.errors import InputError
from stages.io.files import DigestingFile
from stages.io.storage import read_range
from stages.io.untrusted import MAX_SHOWN, check_regular, shown

MAX_HEADER_BYTES = 100_000_000
"""Same bound as in the safetensors library."""
_MAX_VALUES = 1 << 22
"""Bound for the JSON values of a header. A parsed value takes some 60 bytes. The bound allows 500,000 tensors."""
_MAX_AXES = 64
_MAX_SIZE = (1 << 63) - 1

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk: its file, dtype (safetensors name), shape, and the position of its first byte in the file.

    packing: for a quantised tensor, where its values are stored; dtype, shape and num_bytes then describe the values.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int
    packing: "Packing | None" = None

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk; for a quantised tensor, bytes of all its parts."""
        return sum(part.num_bytes for part in self.packing.parts.values()) if self.packing else self.num_bytes

    @property
    def num_elements(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Packing:
    """Storage of a quantised tensor's values. parts: what stands on disk, by its part in the scheme."""

    scheme: Scheme
    parts: Mapping[str, TensorEntry]


@dataclass(frozen=True)
class SafetensorsHeader:
    """A safetensors file's header: its entries in the order of their bytes, and its free-form metadata."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Parse and check the header of one safetensors file.

    Raises InputError, naming file and tensor, when the file is not regular or is truncated, the header violates the format, or
    a tensor's offsets overlap, leave a gap, leave the file or disagree with its dtype and shape.
    """
    text, file_bytes = _header_text(path)
    fields = _parsed(path, text)
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: the safetensors header's __metadata__ must map strings to strings; download the file again")
    if not all(_is_unicode(value) for pair in metadata.items() for value in pair):
        raise InputError(
            f"{path}: the safetensors header's __metadata__ holds half a character (a lone surrogate); download the file again"
        )
    data_begin = 8 + len(text)
    entries = [_entry(path, name, value, data_begin, file_bytes) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.num_bytes))
    position = data_begin
    for entry in entries:
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise InputError(
                f"{path}: tensor {entry.name} begins at byte {entry.begin:,} instead of {position:,}: it {problem}; "
                f"download it again"
            )
        position += entry.num_bytes
    if position != file_bytes:
        raise InputError(
            f"{path} has {file_bytes:,} bytes but its header describes {position:,}; the file is "
            f"{'truncated' if position > file_bytes else 'longer than it says'}: download it again"
        )
    return SafetensorsHeader(tuple(entries), metadata)


def _header_text(path: Path) -> tuple[bytes, int]:
    """The JSON of a header, and the size of its file."""
    try:
        check_regular(path)
        file_bytes = path.stat().st_size
        prefix = read_range(path, 0, 9)
        if prefix == b"version h":
            raise InputError(f"{path} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`")
        header_bytes = int.from_bytes(prefix[:8], "little")
        if len(prefix) < 9 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise InputError(
                f"{path} is not a whole safetensors file: it has {file_bytes:,} bytes and its header says it is "
                f"{header_bytes:,} bytes long; download it again"
            )
        if prefix[8:] not in (b"{", b"[", b" "):  # detects a sparse file that was never filled
            raise InputError(
                f"{path}: the safetensors header is not JSON: it begins with {prefix[8:]!r}; download the file again"
            )
        return read_range(path, 8, header_bytes), file_bytes
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; download the checkpoint's missing file") from e
    except PermissionError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}; change its permissions") from e


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    num_values = sum(text.count(sign) for sign in (b",", b"[", b"{"))
    if num_values > _MAX_VALUES:
        raise InputError(
            f"{path}: the safetensors header has some {num_values:,} values; at most {_MAX_VALUES:,} are read; "
            f"merge its tensors into fewer, or report the model"
        )
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return found

    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, an endless number or too deep a nesting
        raise InputError(f"{path}: the safetensors header is not JSON: {e}; download the file again") from e
    if not isinstance(fields, dict):
        raise InputError(f"{path}: the safetensors header is not a JSON object; download the file again")
    if twice:
        raise InputError(f"{path}: the safetensors header has {shown(twice[0])} twice; download the file again")
    return fields


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _entry(path: Path, name: str, value: Any, data_begin: int, file_bytes: int) -> TensorEntry:
    if not name.isprintable() or len(name) > MAX_SHOWN:
        raise InputError(
            f"{path}: tensor {shown(name)}: a name has at most {MAX_SHOWN} characters, all of them printable; "
            f"download the file again"
        )
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as e:
        raise InputError(f"{path}: tensor {name} lacks dtype, shape or two data_offsets; download it again") from e
    if not isinstance(shape, list):
        raise InputError(f"{path}: tensor {name} lacks dtype, shape or two data_offsets; download it again")
    if len(shape) > _MAX_AXES:
        raise InputError(f"{path}: tensor {name} has {len(shape):,} axes; at most {_MAX_AXES} are read; download it again")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_SIZE for n in (*shape, begin, end)):
        raise InputError(
            f"{path}: tensor {name} has shape {shown(str(shape))} and offsets {shown(str([begin, end]))}; all must be "
            f"integers >= 0 and below 2^63; download it again"
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"{path}: tensor {name} has the unknown dtype {shown(repr(dtype))}; known: {', '.join(DTYPE_BITS)}")
    num_bits = _num_elements(shape) * DTYPE_BITS[dtype]
    if num_bits > 8 * file_bytes:
        raise InputError(
            f"{path}: tensor {name} ({dtype} {shape}) needs more bytes than the {file_bytes:,} of its file; download it again"
        )
    if num_bits % 8:
        raise InputError(
            f"{path}: tensor {name} ({dtype} {shape}) ends within a byte, which the format does not allow; download it again"
        )
    if end - begin != num_bits // 8:
        raise InputError(
            f"{path}: tensor {name} ({dtype} {shape}) needs {num_bits // 8:,} bytes but its offsets span {end - begin:,}; "
            f"download it again"
        )
    return TensorEntry(name, path.name, dtype, tuple(shape), data_begin + begin, num_bits // 8)


def _num_elements(shape: Sequence[int]) -> int:
    """Product of sizes, computed only as far as needed to reject it.
    Like the library, rejects a partial product beyond 64 bits even if a later size is 0."""
    product = 1
    for size in shape:
        product *= size
        if product > _MAX_SIZE:
            break
    return product


def write_header(
    out: DigestingFile, tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors header for tensors (name, dtype, shape, bytes) whose bytes follow in this order.

    The library needs all tensors in memory to write a file. This program streams tensors, so it writes the header first.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape, num_bytes in tensors:
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + num_bytes]}
        position += num_bytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little"))
    out.write(text)
