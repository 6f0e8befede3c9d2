"""Reads weights from the checkpoint's files directly into the model's own tensors, each byte once and without copies. Large
matrices of experts are mapped instead of read where possible.

transformers' conversions decide which tensors are loaded here: those that are only renamed, and those of experts that are
stacked to one tensor, with gate and up side by side. transformers itself loads all others (quantised, cast, transposed, split).
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    build_glob_alternation,
    dot_natural_key,
)

from stages.checkpoint.finite import is_finite
from stages.checkpoint.headers import TensorEntry
from stages.checkpoint.reader import TORCH_DTYPES
from stages.contracts.errors import InputError
from stages.io.file_cache import read_ahead
from stages.io.files import read_into
from stages.io.storage import is_remote
from stages.model.adapter import AdaptedModel
from stages.model.mapped import MappedFile, MappedRows, MappedStack
from stages.model.upload import PinnedCopies, Upload

_READ_BYTES = 1 << 20
"""Bytes read at a time. They are checked while still in the processor's cache."""
_REMOTE_READ_BYTES = 1 << 28
"""The same for object storage, where each request has a latency and ranges are read in parallel."""
MAPPED_BYTES = 8 << 20
"""Least size in bytes of an expert's matrix that is mapped.
Smaller matrices are stored side by side, to be multiplied together."""


@dataclass(frozen=True)
class Part:
    """A tensor on disk and its place in a parameter: rows from `row` on of expert `index`, or all of it (index None)."""

    entry: TensorEntry
    index: int | None = None
    row: int = 0


def load_directly(
    adapted: AdaptedModel, names: Iterable[str], device: torch.device, mappable: Collection[str] = ()
) -> tuple[list[str], dict[str, MappedStack]]:
    """Fill the parameters that need no arithmetic. Returns the names of the tensors left to transformers, and the mapped
    parameters.

    mappable: parameters (stacks of experts) that may be mapped if their matrices are large. Mapped parameters stay on the meta
    device. Raises InputError, naming file and tensor, for NaN, infinity, or a file that has become shorter.
    """
    state = adapted.model.state_dict()
    plan = list(adapted.model._get_dtype_plan(adapted.model.dtype))
    cast = build_glob_alternation(plan)[0] if plan else None
    opened = cache(lambda file: MappedFile.open(adapted.checkpoint.folder / file))
    left, to_map = [], {}
    with uploads(device) as upload:
        for parameter, tensors in sources_of(adapted, names).items():
            due = state[parameter]
            parts = None if cast is not None and cast.search(parameter) else _parts(adapted, tensors, due)
            if parts is None:
                left += tensors
                continue
            is_worth_it = parameter in mappable and due.nbytes >= MAPPED_BYTES * len(due)
            pairs = _in_mapped_files(parts, opened) if is_worth_it else None
            if pairs is not None:
                to_map[parameter] = pairs
            else:
                _set(adapted.model, parameter, _read(adapted, parts, due, device, upload))
    return left, _map(adapted, to_map, state)


def sources_of(adapted: AdaptedModel, names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors on disk by the parameter that they become part of."""
    sources: dict[str, list[str]] = defaultdict(list)
    for name in names:
        sources[adapted.destinations[name].parameter].append(name)
    return sources


def uploads(device: torch.device) -> AbstractContextManager[Upload | None]:
    """Copier of weights to a GPU's memory; None for a CPU, into whose memory weights are read directly."""
    return Upload(PinnedCopies(device)) if device.type == "cuda" else nullcontext()


def _parts(adapted: AdaptedModel, names: list[str], due: Tensor) -> list[Part] | None:
    """Place of each tensor in a parameter of the shape and dtype of `due`; None if it needs more than reading."""
    entries = [adapted.checkpoint.tensors[name] for name in names]
    if any(entry.packing is not None or TORCH_DTYPES.get(entry.dtype) != due.dtype for entry in entries):
        return None
    return places(adapted, names, due)


def places(adapted: AdaptedModel, names: list[str], due: Tensor) -> list[Part] | None:
    """Place of each tensor in a parameter of the shape of `due`; None if it is not simply stacked."""
    entries = {name: adapted.checkpoint.tensors[name] for name in names}
    patterns = {adapted.destinations[name].pattern for name in names}
    if patterns == {None}:
        (entry,) = entries.values() if len(entries) == 1 else (None,)
        return [Part(entry)] if entry is not None and entry.shape == tuple(due.shape) else None
    converter = next(one for one in adapted.weight_mapping if set(one.source_patterns) >= patterns - {None})
    if None in patterns or not _is_stack(converter):
        return None
    parts, row = [], 0
    for pattern in converter.source_patterns:
        stack = sorted((name for name in names if adapted.destinations[name].pattern == pattern), key=dot_natural_key)
        shapes = {entries[name].shape for name in stack}
        if len(stack) != due.shape[0] or len(shapes) != 1:
            return None
        parts += [Part(entries[name], index, row) for index, name in enumerate(stack)]
        (shape,) = shapes
        if shape[1:] != tuple(due.shape[2:]):
            return None
        row += shape[0]
    return parts if row == due.shape[1] else None


def _is_stack(converter: object) -> bool:
    """Whether a conversion stacks experts and, if an expert has several tensors, concatenates their rows."""
    if not isinstance(converter, WeightConverter) or len(converter.target_patterns) != 1:
        return False
    merge, *concatenate = converter.operations
    if type(merge) is not MergeModulelist or merge.dim != 0:
        return False
    if not concatenate:
        return len(converter.source_patterns) == 1
    return len(concatenate) == 1 and type(concatenate[0]) is Concatenate and concatenate[0].dim == 1


def _in_mapped_files(parts: list[Part], opened: Callable[[str], MappedFile | None]) -> list[tuple[Part, MappedFile]] | None:
    """Parts with their mapped files; None if a file cannot be mapped or a tensor's first byte is not aligned to its dtype."""
    pairs = [(part, file) for part in parts if (file := opened(part.entry.file)) is not None]
    are_aligned = all(part.entry.begin % TORCH_DTYPES[part.entry.dtype].itemsize == 0 for part in parts)
    return pairs if are_aligned and len(pairs) == len(parts) else None


def _map(
    adapted: AdaptedModel, to_map: dict[str, list[tuple[Part, MappedFile]]], state: dict[str, Tensor]
) -> dict[str, MappedStack]:
    """Map parameters and check their numbers. The check also reads the files into the file cache for later use."""
    entries = [part.entry for pairs in to_map.values() for part, _ in pairs]
    read_ahead(adapted.checkpoint.folder, [(entry.file, entry.begin, entry.num_bytes) for entry in entries])
    stacks = {}
    for parameter, pairs in to_map.items():
        stack: list[list[MappedRows]] = [[] for _ in state[parameter]]
        for part, file in pairs:
            dtype = TORCH_DTYPES[part.entry.dtype]
            if part.entry.begin + part.entry.num_bytes > file.num_bytes:
                raise _is_shorter(adapted, part.entry, f"ends at byte {file.num_bytes:,}")
            values = file.tensor(part.entry.begin, dtype, part.entry.shape)
            per_expert = [(part.index, values)] if part.index is not None else list(enumerate(values))
            for number, (expert, matrix) in enumerate(per_expert):
                rows = MappedRows(file, part.entry.begin + number * matrix.nbytes, part.row, matrix)
                for piece in matrix.flatten().split(_READ_BYTES // matrix.element_size()):
                    _check_finite(adapted, part.entry, piece)
                rows.release()
                stack[expert].append(rows)
        stacks[parameter] = MappedStack(stack)
    return stacks


def _read(adapted: AdaptedModel, parts: list[Part], due: Tensor, device: torch.device, upload: Upload | None) -> Tensor:
    value = torch.empty(due.shape, dtype=due.dtype, device=device)
    for part in parts:
        rows = slice(part.row, part.row + part.entry.shape[0]) if part.index is not None else None
        place = value if rows is None else value[part.index, rows]
        read = partial(_fill, adapted, part.entry)
        if upload is None:
            read(0, place.view(-1))
        else:
            upload.fill(place.view(-1), read)
    return value


def _fill(adapted: AdaptedModel, entry: TensorEntry, first: int, flat: Tensor) -> None:
    """Fill host memory with a tensor's values, starting at value `first`."""
    path = adapted.checkpoint.folder / entry.file
    begin, step = entry.begin + first * flat.element_size(), _REMOTE_READ_BYTES if is_remote(path) else _READ_BYTES
    for piece in flat.split(step // flat.element_size()):
        try:
            read_into(path, begin, piece.view(torch.uint8).numpy().data)
        except EOFError as e:
            raise _is_shorter(adapted, entry, str(e)) from e
        begin += piece.nbytes
        _check_finite(adapted, entry, piece)


def _is_shorter(adapted: AdaptedModel, entry: TensorEntry, what: str) -> InputError:
    return InputError(
        f"{adapted.checkpoint.folder / entry.file}: tensor {entry.name}: {what}; it was changed during the "
        f"run: leave the files alone, and run again"
    )


def _check_finite(adapted: AdaptedModel, entry: TensorEntry, piece: Tensor) -> None:
    if not is_finite(piece):
        path = adapted.checkpoint.folder / entry.file
        raise InputError(f"{path}: tensor {entry.name} holds NaN or infinity; download the checkpoint again")


def _set(model: nn.Module, parameter: str, value: Tensor) -> None:
    path, _, name = parameter.rpartition(".")
    owner = model.get_submodule(path)
    filled = value if name in owner._buffers else nn.Parameter(value, requires_grad=False)
    filled._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers' _init_weights draws it anew
    setattr(owner, name, filled)
