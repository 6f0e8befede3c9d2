"""Uploads files to GPU memory: while one block is copied to the GPU, the next is read.

`PinnedCopies` has not been run on a GPU. Tests check when blocks are reused (tests/stages/test_upload.py).
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 24
NUM_BLOCKS = 3


class Copies(Protocol):
    """Copies from host to device that run in the background."""

    def block(self) -> Tensor:
        """Host memory to copy from: uint8 [BLOCK_BYTES]."""

    def start(self, to: Tensor, source: Tensor) -> Any:
        """Start to copy bytes. Neither tensor may be touched until `wait` was called with the returned value."""

    def wait(self, started: Any) -> None:
        """Return once a copy is finished."""


class PinnedCopies:
    """Copies to a CUDA device from page-locked host memory, which its copy engine reads directly, on a separate stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def block(self) -> Tensor:
        """Page-locked host memory to copy from: uint8 [BLOCK_BYTES]."""
        return torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)

    def start(self, to: Tensor, source: Tensor) -> torch.cuda.Event:
        """Start a copy after the work queued on the device, which may still use the memory that `to` has been given."""
        self._stream.wait_stream(torch.cuda.current_stream(to.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()  # type: ignore[no-any-return]

    def wait(self, started: torch.cuda.Event) -> None:
        """Wait until the device has recorded the end of the copy."""
        started.synchronize()


class Upload:
    """Fills tensors on a device through a few blocks of host memory.
    A context manager: all copies are finished when it exits."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._blocks: list[Tensor] = []
        self._started: list[Any] = []
        self._number = 0

    def __enter__(self) -> "Upload":
        return self

    def __exit__(self, *_: object) -> None:
        for started in self._started:
            self._copies.wait(started)

    def fill(self, flat: Tensor, read: Callable[[int, Tensor], None]) -> None:
        """Fill a flat tensor on the device. read(index, block): fills a host block, same dtype, with values from `index` on."""
        per_block = BLOCK_BYTES // flat.element_size()
        for index, to in enumerate(flat.split(per_block)):
            source = self._free_block()[: to.nbytes].view(flat.dtype)
            read(index * per_block, source)
            self._started.append(self._copies.start(to, source))

    def _free_block(self) -> Tensor:
        if len(self._blocks) < NUM_BLOCKS:
            self._blocks.append(self._copies.block())
            return self._blocks[-1]
        self._copies.wait(self._started.pop(0))
        self._number += 1
        return self._blocks[(self._number - 1) % NUM_BLOCKS]
