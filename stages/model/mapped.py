"""Tensors that stay in their files: mapped, so that reading them takes pages of the system's file cache and no memory of ours.

The kernel gives such pages to whoever needs memory, and reads them again when they are used again.
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
    """A file in the address space. It must not become shorter while it is used: the kernel ends the process (SIGBUS)."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as raw:
            self.num_bytes = os.fstat(raw.fileno()).st_size
            self._map = mmap.mmap(raw.fileno(), self.num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """Map a file; None where its file system cannot (some that are FUSE), or where the process may map no more."""
        try:
            return cls(path)
        except OSError as e:
            if e.errno in (errno.ENODEV, errno.ENOMEM):
                return None
            raise

    def tensor(self, begin: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A tensor whose memory is the file's, from byte `begin` on. Read only: writing to it ends the process."""
        count = torch.Size(shape).numel()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(*shape)

    def release(self, begin: int, num_bytes: int) -> None:
        """Stop counting pages as this process's; they stay in the file cache, from where the next use takes them."""
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
        """See MappedFile."""
        self.file.release(self.begin, self.values.nbytes)


@dataclass(frozen=True)
class MappedStack:
    """What would be one tensor [E, rows, columns], expert by expert in pieces."""

    experts: Sequence[Sequence[MappedRows]]

    def release(self, expert: int) -> None:
        """See MappedFile."""
        for piece in self.experts[expert]:
            piece.release()
