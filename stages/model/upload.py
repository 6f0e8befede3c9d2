"""From files to a GPU's memory: while one block is copied there, the next is read.

No GPU has run `PinnedCopies`; what is tested is when blocks are filled anew (tests/stages/test_upload.py).
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 24
NUM_BLOCKS = 3


class Copies(Protocol):
    """Copies from host to device that run beside what the host does."""

    def block(self) -> Tensor:
        """Host memory to copy from: uint8 [BLOCK_BYTES]."""

    def start(self, to: Tensor, source: Tensor) -> Any:
        """Begin a copy of bytes; neither may be touched until `wait` has been given what is returned here."""

    def wait(self, started: Any) -> None:
        """Return once a copy is done."""


class PinnedCopies:
    """Copies of a CUDA device: page-locked host memory, which its copy engine reads by itself, and a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def block(self) -> Tensor:
        """See Copies."""
        return torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)

    def start(self, to: Tensor, source: Tensor) -> torch.cuda.Event:
        """See Copies. Waits on the device for what is queued there: the memory may just have been somebody else's."""
        self._stream.wait_stream(torch.cuda.current_stream(to.device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()  # type: ignore[no-any-return]

    def wait(self, started: torch.cuda.Event) -> None:
        """See Copies."""
        started.synchronize()


class Upload:
    """Fills tensors on a device through a few blocks of host memory. Use as a context manager: all is there when it ends."""

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
        """Fill a flat tensor on the device. read: fills host values of the same dtype with those from an index on."""
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
