"""The bytes of an output file as a stream of blocks: reading, arithmetic and writing overlap, and memory stays flat.

A thread reads blocks of the source, one member after another; a second one sums them; the caller writes. However large a
tensor is, `BUFFERS` blocks of `BLOCK_BYTES` are in memory on either side of the arithmetic. Computed values are the exception:
those of a quantised tensor come one expert at a time.

Every block is checked before it is written, copies too: what transformers loads must be finite. A tensor that it does not load
may hold infinities, as masks do, but no NaN.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stages.checkpoint.finite import is_finite
from stages.checkpoint.weighted_sum import WeightedSum, dtype_name
from stages.contracts.errors import InputError
from stages.io.files import DigestingFile, read_into
from stages.io.prefetch import ahead

BLOCK_BYTES = 1 << 22
DEPTH = 6
"""Blocks made in advance. On a machine with six times as many busy threads as cores 6 took 2.8 s where 2 took 3.3 s."""
BUFFERS = DEPTH + 1


class Buffers:
    """`BUFFERS` blocks of memory, used in turn."""

    def __init__(self) -> None:
        self._blocks = [torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(BUFFERS)]
        self._number = 0

    def take(self, num_bytes: int) -> Tensor:
        """The next block, cut to size; what is larger gets memory of its own."""
        if num_bytes > BLOCK_BYTES:
            return torch.empty(num_bytes, dtype=torch.uint8)
        self._number = (self._number + 1) % BUFFERS
        return self._blocks[self._number][:num_bytes]


@dataclass(frozen=True)
class Part:
    """A block of one member, flat. share: None for values that are written as they are. is_last: completes its output block.

    dtype, place: of the output, and for messages. may_be_infinite: whether only NaN is refused in what is copied.
    """

    values: Tensor
    share: float | None
    is_last: bool
    dtype: torch.dtype
    place: str
    may_be_infinite: bool = False


@dataclass(frozen=True)
class Stretch:
    """Bytes that lie together in a file of plain numbers: a tensor, or one expert's slice of a fused one."""

    path: Path
    begin: int
    num_bytes: int

    def read(self, offset: int, out: Tensor) -> None:
        """Fill uint8 memory from byte `offset` of the stretch on. Raises InputError for a file that has become shorter."""
        try:
            read_into(self.path, self.begin + offset, out.numpy().data)
        except EOFError as e:
            raise InputError(f"{e}; it was changed during the run: leave the files alone, and run again") from e


class Readable(Protocol):
    """Bytes that are read block by block: a `Stretch`, or a choice of neurons."""

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""

    def read(self, offset: int, out: Tensor) -> None:
        """Fill uint8 memory from byte `offset` on."""


@dataclass(frozen=True)
class PlainMean:
    """The weighted sum of members of one size and dtype, with their shares; one alone with share 1 is copied byte for byte.

    dtype: bytes that torch has no numbers for are copied as uint8. may_be_infinite: see Part.
    """

    members: Sequence[tuple[Readable, float]]
    dtype: torch.dtype
    place: str
    may_be_infinite: bool = False

    def parts(self, buffers: Buffers) -> Iterator[Part]:
        """Block by block, each of all members: every byte is read once."""
        num_bytes, num_members = self.members[0][0].num_bytes, len(self.members)
        for offset in range(0, num_bytes, BLOCK_BYTES):
            for number, (stretch, share) in enumerate(self.members, 1):
                block = buffers.take(min(BLOCK_BYTES, num_bytes - offset))
                stretch.read(offset, block)
                if num_members == 1 and share == 1:
                    yield Part(block.view(self.dtype), None, True, self.dtype, self.place, self.may_be_infinite)
                else:
                    yield Part(block.view(self.dtype), share, number == num_members, self.dtype, self.place)


@dataclass(frozen=True)
class ComputedMean:
    """The weighted sum of tensors that are computed when their turn comes; one alone with share 1 is written in `dtype`."""

    members: Iterable[tuple[Tensor, float]]
    num_members: int
    dtype: torch.dtype
    place: str

    def parts(self, _buffers: Buffers) -> Iterator[Part]:
        """One member at a time, whole."""
        for number, (values, share) in enumerate(self.members, 1):
            if self.num_members == 1 and share == 1:
                written = values.to(self.dtype).contiguous().view(-1)
                if self.dtype == torch.float16 and not is_finite(written) and is_finite(values):
                    raise InputError(f"{self.place} exceeds {dtype_name(self.dtype)}; set export.dtype to bfloat16")
                yield Part(written, None, True, self.dtype, self.place)
            else:
                yield Part(values.reshape(-1), share, number == self.num_members, self.dtype, self.place)


Mean = PlainMean | ComputedMean


def _read(means: Iterable[Mean]) -> Generator[Part, None, None]:
    buffers = Buffers()
    for mean in means:
        yield from mean.parts(buffers)


def _summed(means: Iterable[Mean]) -> Generator[Tensor, None, None]:
    """Blocks of the output, uint8."""
    buffers, total = Buffers(), WeightedSum()
    with closing(ahead(_read(means), DEPTH)) as parts:
        for part in parts:
            if part.share is None:
                if not is_finite(part.values, part.may_be_infinite):
                    bad = "NaN" if part.may_be_infinite else "NaN or infinity"
                    raise InputError(f"{part.place} holds {bad}; download the checkpoint again")
                yield buffers.take(part.values.nbytes).copy_(part.values.view(torch.uint8))
                continue
            total.add(part.values, part.share)
            if part.is_last:
                out = buffers.take(len(part.values) * part.dtype.itemsize)
                total.round_into(out.view(part.dtype), part.place)
                yield out


def write_means(out: DigestingFile, means: Iterable[Mean]) -> None:
    """Write means one after another. Raises InputError, naming the place, where one is not finite."""
    with closing(ahead(_summed(means), DEPTH)) as blocks:
        for block in blocks:
            out.write(block.numpy().data)
