"""Safetensors headers, read and written without the tensors.

Layout: https://github.com/huggingface/safetensors#format (8 bytes little-endian header size, JSON header, tensor bytes).
Headers are untrusted: every offset is checked against the file before it is used.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.common.errors import InputError
from stages.common.files import DigestingFile
from stages.common.storage import read_range

MAX_HEADER_BYTES = 100_000_000

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk: its file, dtype (safetensors' name), shape, and where its bytes begin in that file.

    packing: for a quantised tensor, how to get at its values; dtype, shape and num_bytes are then those of the values.
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
        """Bytes on disk; of a quantised tensor, of its packed numbers and scales."""
        return self.packing.weight.num_bytes + self.packing.scales.num_bytes if self.packing else self.num_bytes

    @property
    def num_elements(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Packing:
    """Where a quantised tensor's values are: its numbers and its scales as they lie on disk.

    scheme: "fp8" or "mxfp4". block: rows and columns that share a scale.
    """

    scheme: str
    weight: TensorEntry
    scales: TensorEntry
    block: tuple[int, int]


@dataclass(frozen=True)
class SafetensorsHeader:
    """A safetensors file's header: its entries in the order of their bytes, and its free-form metadata."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Parse and check the header of one safetensors file.

    Raises InputError, naming file and tensor, when the file is truncated, the header is not what the format says, or
    a tensor's offsets overlap, leave a gap, leave the file or disagree with its dtype and shape.
    """
    try:
        file_bytes = path.stat().st_size
        prefix = read_range(path, 0, 8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise InputError(
                f"{path} is not a whole safetensors file: it has {file_bytes:,} bytes and its header says it is "
                f"{header_bytes:,} bytes long; download it again"
            )
        text = read_range(path, 8, header_bytes)
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; download the checkpoint's missing file") from e
    try:
        fields = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number or a nesting without end
        raise InputError(f"{path}: the safetensors header is not JSON: {e}; download the file again") from e
    if not isinstance(fields, dict):
        raise InputError(f"{path}: the safetensors header is not a JSON object; download the file again")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: the safetensors header's __metadata__ must map strings to strings")
    data_begin = 8 + header_bytes
    entries = [_entry(path, name, value, data_begin) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.num_bytes))
    position = data_begin
    for entry in entries:
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise InputError(
                f"{path}: tensor {entry.name} begins at byte {entry.begin:,} where {position:,} is due: it {problem}"
            )
        position += entry.num_bytes
    if position != file_bytes:
        raise InputError(
            f"{path} has {file_bytes:,} bytes but its header describes {position:,}; the file is "
            f"{'truncated' if position > file_bytes else 'longer than it says'}: download it again"
        )
    return SafetensorsHeader(tuple(entries), metadata)


def _entry(path: Path, name: str, value: Any, data_begin: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        well_formed = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError) as e:
        raise InputError(f"{path}: tensor {name} lacks dtype, shape or two data_offsets") from e
    if not well_formed:
        raise InputError(f"{path}: tensor {name} has shape {shape} and offsets [{begin}, {end}]; all must be integers >= 0")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"{path}: tensor {name} has the unknown dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    due_bytes = (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8
    if end - begin != due_bytes:
        raise InputError(
            f"{path}: tensor {name} ({dtype} {list(shape)}) needs {due_bytes:,} bytes but its offsets span {end - begin:,}"
        )
    return TensorEntry(name, path.name, dtype, shape, data_begin + begin, due_bytes)


def write_header(
    out: DigestingFile, tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors header for tensors (name, dtype, shape, bytes) whose bytes follow in this order.

    The library writes a file only from tensors that are all in memory; ours are streamed, so the header comes first.
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
