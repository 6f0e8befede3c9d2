"""A Hugging Face checkpoint folder, read from its configuration and safetensors headers alone.

Layout of a safetensors file: https://github.com/huggingface/safetensors#format (8 bytes little-endian header size,
JSON header, tensor bytes). Headers are untrusted: every offset is checked against the file before it is used.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from stages.common.errors import InputError
from stages.common.files import DigestingFile

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_HEADER_BYTES = 100_000_000

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor on disk: its file, dtype (safetensors' name), shape, and where its bytes begin in that file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsHeader:
    """A safetensors file's header: its entries in the order of their bytes, and its free-form metadata."""

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises InputError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist") from e
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number or a nesting without end
        raise InputError(f"{path} is not valid JSON: {e}") from e


def read_header(path: Path) -> SafetensorsHeader:
    """Parse and check the header of one safetensors file.

    Raises InputError, naming file and tensor, when the file is truncated, the header is not what the format says, or
    a tensor's offsets overlap, leave a gap, leave the file or disagree with its dtype and shape.
    """
    try:
        file_bytes = path.stat().st_size
        with open(path, "rb") as raw:
            prefix = raw.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise InputError(
                    f"{path} is not a whole safetensors file: it has {file_bytes:,} bytes and its header says it is "
                    f"{header_bytes:,} bytes long; download it again"
                )
            text = raw.read(header_bytes)
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


class Checkpoint:
    """A checkpoint folder. Nothing is read before it is asked for; everything that is read is checked.

    Raises InputError from any property when the folder, its config, its index or one of its headers is not usable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"model: {self.folder} is not a folder; give a checkpoint folder with {CONFIG_FILE}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The raw `config.json`."""
        value = read_json(self.folder / CONFIG_FILE)
        if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
            raise InputError(f"{self.folder / CONFIG_FILE} has no model_type; it does not describe a transformers model")
        return value

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files, in the order of their names."""
        return tuple(sorted(set(self._weight_map.values()))) if self._weight_map else (SINGLE_FILE,)

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX_FILE
        if not path.exists():
            if not (self.folder / SINGLE_FILE).exists():
                self._refuse_without_safetensors()
            return {}
        index = read_json(path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{path} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or PurePosixPath(file).name != file or "\\" in file or file in ("", ".", ".."):
                raise InputError(f"{path}: tensor {name} is said to lie in {file!r}; only files in the folder itself are read")
            if not file.endswith(".safetensors"):
                raise InputError(f"{path}: tensor {name} lies in {file!r}, which is not a safetensors file")
        return weight_map

    def _refuse_without_safetensors(self) -> None:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise InputError(
                f"{self.folder} holds its weights as pickle files ({pickles[0]}, ...), which can run code when read; convert "
                f"them to safetensors first (load with transformers and call save_pretrained)"
            )
        raise InputError(f"{self.folder} has neither {INDEX_FILE} nor {SINGLE_FILE}")

    @cached_property
    def headers(self) -> dict[str, SafetensorsHeader]:
        """Header of each weight file."""
        headers = {file: read_header(self.folder / file) for file in self.files}
        found = {entry.name: file for file, header in headers.items() for entry in header.entries}
        total = sum(len(header.entries) for header in headers.values())
        if not total:
            raise InputError(f"{self.folder} holds no tensor: {', '.join(self.files)} describes none; download it again")
        if total != len(found):
            raise InputError(f"{self.folder}: the same tensor name stands in several weight files")
        for name, file in self._weight_map.items():
            if found.get(name) != file:
                raise InputError(f"{self.folder / INDEX_FILE} puts tensor {name} in {file}, which does not hold it")
        return headers

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name, files in order of their names, tensors in order of their bytes."""
        return {entry.name: entry for file in self.files for entry in self.headers[file].entries}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    def side_files(self) -> list[Path]:
        """Every other regular file at the top of the folder: tokenizer, templates, generation config, licence."""
        skipped = {CONFIG_FILE, INDEX_FILE, *self.files}
        weights = (*PICKLE_SUFFIXES, ".safetensors", ".index.json", ".h5", ".msgpack", ".onnx", ".gguf")
        return sorted(
            path for path in self.folder.iterdir()
            if path.is_file() and path.name not in skipped and not path.name.startswith(".") and not path.name.endswith(weights)
        )  # fmt: skip


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
