"""Reads small untrusted files: only regular ones, and only up to a stated size."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from stages.contracts.errors import InputError
from stages.io.storage import is_remote, read_start

MAX_SMALL_BYTES = 1 << 28
"""Bound for configs, indices and tokenizers. The largest known, an index of 90,000 tensors, takes 10 MB."""

MAX_SHOWN = 1000
"""Maximum number of characters of a name in an error message. Longer names are shortened."""


def shown(text: str) -> str:
    """Untrusted text as error messages show it: one line, shortened if too long. Ordinary names are unchanged."""
    shortened = text if len(text) <= MAX_SHOWN else f"{text[:80]}... ({len(text):,} characters)"
    return shortened if shortened.isprintable() else ascii(shortened)


def check_regular(path: Path) -> None:
    """Raise InputError unless path is a regular file or a link to one. Reading a pipe or a device may never end, or never
    begin.

    Raises FileNotFoundError when the path does not exist or is a broken link.
    """
    if is_remote(path):
        return  # an object is always a regular file
    try:
        mode = path.stat().st_mode
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise
        raise InputError(f"{path} is a link that leads in a circle; a regular file is needed") from e
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise InputError(f"{path} is a {kind}; a regular file is needed")


def read_small(path: Path, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """Content of a small regular file. Raises InputError for any other file, FileNotFoundError when there is none.

    The file is opened without blocking, so that the reader cannot hang even if a pipe replaces the file at that moment.
    """
    check_regular(path)
    if is_remote(path):
        data = read_start(path, max_bytes + 1)
        num_bytes = len(data) if len(data) <= max_bytes else path.stat().st_size
    else:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as raw:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise InputError(f"{path} is not a regular file; put one there")
            data = raw.read(max_bytes + 1)
            num_bytes = max(len(data), os.fstat(descriptor).st_size)
    if num_bytes > max_bytes:
        raise InputError(
            f"{path} has {num_bytes:,} bytes; at most {max_bytes:,} are read of a file of this kind: remove "
            f"what does not belong there, or give another file"
        )
    return data


def read_json(path: Path, max_bytes: int = MAX_SMALL_BYTES) -> Any:
    """Parse a JSON file. Raises InputError when it is missing, too large, not regular, or not JSON."""
    try:
        return json.loads(read_small(path, max_bytes).decode("utf-8"))
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist; restore it") from e
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, an endless number or too deep a nesting
        if isinstance(e, InputError):
            raise
        raise InputError(f"{path} is not valid JSON: {e}; restore it") from e
