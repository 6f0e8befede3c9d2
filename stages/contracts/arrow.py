"""Reads and writes Arrow files (IPC file format). Each kind of record has a module with its schema, writer and reader."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from stages.contracts.errors import InputError
from stages.io.files import WrittenFile, write_file
from stages.io.storage import is_remote

VERSION = "2"

Array = np.ndarray[Any, np.dtype[Any]]
Columns = Mapping[str, Any]
"""Values of each column: an Arrow array, a NumPy array or a list."""


def write_table(path: Path, columns: Columns, schema: pa.Schema) -> WrittenFile:
    """Write one Arrow file (IPC file format) with the schema's version in its metadata."""
    versioned = schema.with_metadata({**(schema.metadata or {}), b"version": VERSION.encode()})
    table = pa.table({name: columns[name] for name in schema.names}, schema=versioned)

    def write(out: Any) -> None:
        with pa.ipc.new_file(pa.PythonFile(out, mode="w"), versioned) as writer:
            writer.write_table(table)

    return write_file(path, write)


def read_table(path: Path) -> pa.Table:
    """Read an Arrow file of this version. Raises InputError for a file of another version or a damaged one."""
    try:
        if is_remote(path):
            table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
        else:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as e:
        raise InputError(f"{path} is not a readable Arrow file ({e}); delete it and run again") from e
    version = (table.schema.metadata or {}).get(b"version", b"").decode()
    if version != VERSION:
        raise InputError(f"{path} has version {version!r}, this program reads {VERSION!r}; use a new run_dir")
    return table


def list_column(values: Array, value_type: pa.DataType) -> pa.Array:
    """A 2-D array [rows, n] as a column of fixed-size lists of n values."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type=value_type), values.shape[1])


def read_lists(table: pa.Table, name: str) -> Array:
    """A column of fixed-size lists of n values as an array [rows, n]."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)  # type: ignore[no-any-return]
