"""The system's file cache, filled before it is needed."""

import os
import threading
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from stages.io.storage import is_remote

Stretch = tuple[str, int, int]


def read_ahead(folder: Path, stretches: Sequence[Stretch]) -> None:
    """Have stretches (file, first byte, bytes) of a folder's files read in the background.

    A hint to the kernel: object storage has no such cache, and macOS no such hint; nothing is done there.
    """
    if not is_remote(folder) and hasattr(os, "posix_fadvise"):
        threading.Thread(target=_advise, args=(folder, stretches), name="read ahead", daemon=True).start()


def _advise(folder: Path, stretches: Iterable[Stretch]) -> None:
    """A thread, since the kernel lets the caller wait while its queue to the disk is full."""
    for file, parts in groupby(sorted(stretches), key=lambda stretch: stretch[0]):
        descriptor = os.open(folder / file, os.O_RDONLY)
        try:
            for _, begin, num_bytes in parts:
                os.posix_fadvise(descriptor, begin, num_bytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
