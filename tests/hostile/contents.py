"""What a case puts in a file, a tag of YAML each: `!sparse 3_000_000_000`, `!link /dev/zero`, `!npy {shape: [8, 32]}`."""

import gzip
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from safetensors.numpy import save


@dataclass(frozen=True)
class Content:
    """The tag and value of one file; `put` makes it."""

    kind: str
    value: Any

    def put(self, path: Path, folder: Path) -> None:
        """Make the file at path. folder: that of the case, for paths in the value."""
        MAKERS[self.kind](path, self.value, folder)


def _bytes(make: Callable[[Any], bytes]) -> Callable[[Path, Any, Path], None]:
    def put(path: Path, value: Any, folder: Path) -> None:
        path.write_bytes(make(value))

    return put


def _repeated(value: Any) -> bytes:
    """Texts, and pairs of a text and how often it is repeated."""
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in value).encode()


def array(value: dict[str, Any]) -> np.ndarray:
    """shape, dtype (int64) and either value, which fills it, or values."""
    dtype = np.dtype(value.get("dtype", "int64"))
    if "values" in value:
        return np.array(value["values"], dtype)
    return np.full(value["shape"], value.get("value", 1), dtype)


def _npy(value: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    np.save(out, array(value), allow_pickle=True)
    return out.getvalue()


def _npy_header(path: Path, value: dict[str, Any], folder: Path) -> None:
    """A .npy header of any content, and so many bytes of zeros, which take no room."""
    text = value["header"].encode() + b"\n"
    with path.open("wb") as out:
        out.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        out.truncate(out.tell() + value["zeros"])


def _safetensors(path: Path, value: dict[str, Any], folder: Path) -> None:
    """A safetensors file of any header, given as a text or as JSON, and so many bytes of zeros, which take no room."""
    header = value["header"] if isinstance(value["header"], str) else json.dumps(value["header"])
    with path.open("wb") as out:
        out.write(value.get("header_bytes", len(header.encode())).to_bytes(8, "little") + header.encode())
        out.truncate(out.tell() + value.get("zeros", 0))


def _sparse(path: Path, value: Any, folder: Path) -> None:
    """So many bytes of zeros, which take no room; or a text and then zeros up to so many bytes."""
    text, num_bytes = ("", value) if isinstance(value, int) else value
    with path.open("wb") as out:
        out.write(text.encode())
        out.truncate(num_bytes)


def _parquet(value: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    pa.parquet.write_table(pa.table(value), out)
    return out.getvalue()


def _cut(path: Path, value: int, folder: Path) -> None:
    path.write_bytes(path.read_bytes()[:value])


def _fold(path: Path, value: Any, folder: Path) -> None:
    path.mkdir()


MAKERS: dict[str, Callable[[Path, Any, Path], object]] = {
    "text": lambda path, value, folder: path.write_bytes(value.encode()),
    "bytes": _bytes(lambda value: value.encode("latin-1")),
    "encoded": _bytes(lambda value: value[1].encode(value[0])),
    "json": _bytes(lambda value: json.dumps(value).encode()),
    "repeated": _bytes(_repeated),
    "gzip": _bytes(lambda value: gzip.compress(value.encode())),
    "zstd": _bytes(lambda value: pa.compress(value.encode(), codec="zstd", asbytes=True)),
    "parquet": _bytes(_parquet),
    "npy": _bytes(_npy),
    "npy_header": _npy_header,
    "ids": _bytes(lambda value: save({name: array(one) for name, one in value.items()})),
    "safetensors": _safetensors,
    "sparse": _sparse,
    "fifo": lambda path, value, folder: os.mkfifo(path),
    "folder": _fold,
    "link": lambda path, value, folder: path.symlink_to(value.replace("FOLDER", str(folder))),
    "copy": lambda path, value, folder: shutil.copy(folder / value, path),
    "cut": _cut,
}


class Loader(yaml.SafeLoader):
    """YAML with a tag for each kind of content."""


def _constructor(kind: str) -> Callable[[Any, yaml.Node], Content]:
    def construct(loader: Any, node: yaml.Node) -> Content:
        if isinstance(node, yaml.ScalarNode):
            tag = loader.resolve(yaml.ScalarNode, node.value, (node.style is None, False))
            return Content(kind, loader.construct_object(yaml.ScalarNode(tag, node.value), deep=True))
        make = loader.construct_mapping if isinstance(node, yaml.MappingNode) else loader.construct_sequence
        return Content(kind, make(node, deep=True))

    return construct


for _kind in MAKERS:
    Loader.add_constructor(f"!{_kind}", _constructor(_kind))
