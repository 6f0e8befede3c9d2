"""Fills the system's file cache before the data are needed."""

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from stages.io.storage import is_remote

Stretch = tuple[str, int, int]


def read_ahead(folder: Path, stretches: Sequence[Stretch]) -> None:
    """Start to read stretches (file, first byte, number of bytes) of a folder's files in the background.

    This is a hint to the kernel. It does nothing for object storage, which has no file cache, and on macOS, which has no such
    hint.
    """
    if not is_remote(folder) and hasattr(os, "posix_fadvise"):
        threading.Thread(target=_advise, args=(folder, stretches), name="read ahead", daemon=True).start()


def _advise(folder: Path, stretches: Iterable[Stretch]) -> None:
    """Give the hints to the kernel. Runs in a thread, because the call blocks while the kernel's queue to the disk is full.

    What cannot be opened gets no hint: whoever reads the file says what is wrong with it.
    """
    for file, parts in groupby(sorted(stretches), key=lambda stretch: stretch[0]):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / file, os.O_RDONLY)
            try:
                for _, begin, num_bytes in parts:
                    os.posix_fadvise(descriptor, begin, num_bytes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
