"""Tensors that stay in their files: mapped, so that they occupy the system's file cache and no memory of this process.

The kernel reclaims such pages when memory is needed, and reads them again on the next use.
"""

import errno
import mmap
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor


class MappedFile:
    """A mapped file. It must not become shorter while it is used: the kernel would end the process (SIGBUS)."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as raw:
            self.num_bytes = os.fstat(raw.fileno()).st_size
            self._map = mmap.mmap(raw.fileno(), self.num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Map a file. Returns None if its file system cannot map (some FUSE ones), or if the process may not map more."""
        try:
            return cls(path)
        except OSError as e:
            if e.errno in (errno.ENODEV, errno.ENOMEM):
                return None
            raise

    def tensor(self, begin: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A tensor whose memory is the file, from byte `begin` on. Read only: writing to it ends the process."""
        count = torch.Size(shape).numel()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(*shape)

    def release(self, begin: int, num_bytes: int) -> None:
        """Stop counting pages as memory of this process. They stay in the file cache, so the next use is fast."""
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, first, begin + num_bytes - first)


@dataclass(frozen=True)
class MappedRows:
    """Rows of an expert's matrix, from row `row` on: [rows, columns]."""

    file: MappedFile
    begin: int
    row: int
    values: Tensor

    def release(self) -> None:
        """Release the pages of these rows, as `MappedFile.release` does."""
        self.file.release(self.begin, self.values.nbytes)


@dataclass(frozen=True)
class MappedStack:
    """Replaces a tensor [E, rows, columns] by mapped pieces, grouped by expert."""

    experts: Sequence[Sequence[MappedRows]]

    @property
    def device(self) -> torch.device:
        """Files are mapped into the memory of a CPU."""
        return torch.device("cpu")

    def release(self, expert: int) -> None:
        """Release the pages of one expert, as `MappedFile.release` does."""
        for piece in self.experts[expert]:
            piece.release()
