"""Experts of a quantised checkpoint that stay packed in a worker's memory, and are unpacked one at a time when they are used.

Dimensions: E experts.
"""

import ctypes
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from stages.checkpoint.finite import is_finite
from stages.checkpoint.reader import TensorReader
from stages.checkpoint.schemes import Scheme
from stages.contracts.errors import InputError
from stages.model.adapter import AdaptedModel
from stages.model.direct_load import Part, places, sources_of
from stages.model.families import family_of

_M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
_OWN_PAGES_BYTES = 1 << 18


class PackedRows:
    """Rows of an expert's matrix, from row `row` on. parts: as stored, on the worker's device."""

    def __init__(self, row: int, scheme: Scheme, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.row = row
        self._scheme, self._parts, self._dtype = scheme, parts, dtype
        self._values: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The values [rows, columns], unpacked on first use and kept until `release`."""
        if self._values is None:
            from stages.checkpoint.codec import dequantise  # slow to import, and only quantised sources need it

            self._values = dequantise(self._scheme, self._parts).to(self._dtype)
        return self._values

    def release(self) -> None:
        """Free the values. The packed parts stay."""
        self._values = None


class PackedStack:
    """Replaces a parameter [E, rows, columns]: indexing unpacks one expert."""

    def __init__(self, experts: Sequence[Sequence[PackedRows]], due: Tensor, device: torch.device) -> None:
        self.experts, self.shape, self.dtype, self.device = experts, due.shape, due.dtype, device

    def __getitem__(self, expert: int) -> Tensor:
        values = torch.cat([piece.values for piece in self.experts[expert]])
        self.release(expert)
        return values

    def release(self, expert: int) -> None:
        """Free an expert's values."""
        for piece in self.experts[expert]:
            piece.release()


def packed_parts(adapted: AdaptedModel, names: Iterable[str], experts: Collection[str]) -> dict[str, list[Part]]:
    """Parameters that can stay packed, with the place of each of their tensors. names: tensors on disk. experts: parameters.

    Those of a family whose gates multiply inputs are left out: its own forward computes with values.
    """
    if family_of(adapted.checkpoint.config, str(adapted.checkpoint.folder)).gates_input:
        return {}
    state, tensors = adapted.model.state_dict(), adapted.checkpoint.tensors
    found = {}
    for parameter, sources in sources_of(adapted, names).items():
        if parameter in experts and all(tensors[name].packing is not None for name in sources):
            parts = places(adapted, sources, state[parameter])
            if parts is not None:
                found[parameter] = parts
    return found


@cache
def _give_large_blocks_pages_of_their_own() -> None:
    """Have glibc return what unpacked experts took to the system as soon as it is freed.

    Otherwise it raises the size from which blocks have pages of their own with every such block that is freed, until experts'
    values lie between longer-lived blocks and their room is kept: seen to treble what a worker takes, by chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES_BYTES)


def load_packed(adapted: AdaptedModel, parts: Sequence[Part], due: Tensor, device: torch.device) -> PackedStack:
    """Read the packed parts of a parameter. Raises InputError for scales or numbers that are NaN or infinite."""
    _give_large_blocks_pages_of_their_own()
    stack: list[list[PackedRows]] = [[] for _ in due]
    with TensorReader(adapted.checkpoint) as reader:
        for part in parts:
            packing = part.entry.packing
            assert packing is not None, part.entry.name
            stored = reader.parts(part.entry.name)
            if not all(is_finite(piece) for tensor in stored.values() for piece in (tensor if tensor.ndim > 2 else [tensor])):
                raise InputError(f"{reader.place(part.entry.name)} holds NaN or infinity; download the checkpoint again")
            held = {name: tensor.to(device) for name, tensor in stored.items()}
            if part.index is not None:
                stack[part.index].append(PackedRows(part.row, packing.scheme, held, due.dtype))
                continue
            for expert, rows in enumerate(stack):
                one = {name: tensor[expert] for name, tensor in held.items()}
                rows.append(PackedRows(part.row, packing.scheme, one, due.dtype))
    return PackedStack(stack, due, device)
