"""Reads token ids from a user's file, only as many as are used, and checks them against the model's vocabulary."""

from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from stages.contracts.errors import InputError

_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")

Ids = np.ndarray[Any, np.dtype[np.integer[Any]]]


def read_ids(path: Path, num_sequences: int, sequence_length: int, place: str) -> Ids:
    """The first num_sequences rows and sequence_length columns of the ids [sequences, tokens] in a file.

    The file is a `.npy` file or a safetensors file with one tensor. Raises InputError for any other content, and when the file
    has fewer rows or columns.
    """
    reader = _read_npy if path.suffix.lower() == ".npy" else _read_safetensors
    return reader(path, num_sequences, sequence_length, place)


def _read_npy(path: Path, num_sequences: int, sequence_length: int, place: str) -> Ids:
    try:
        ids_ST = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OverflowError, OSError, TypeError, SyntaxError, RecursionError, TokenError) as e:
        # exceptions of numpy for a damaged header
        raise InputError(
            f"{place}.data: {path} is not a plain numeric .npy file: {_one_line(e)}; write token ids with numpy.save"
        ) from e
    _check_form(path, list(ids_ST.shape), str(ids_ST.dtype), ids_ST.dtype.kind in "iu", place)
    _check_size(path, list(ids_ST.shape), num_sequences, sequence_length, place)
    return ids_ST[:num_sequences, :sequence_length]


def _read_safetensors(path: Path, num_sequences: int, sequence_length: int, place: str) -> Ids:
    try:
        with safe_open(path, "np") as file:
            names = list(file.keys())
            if len(names) != 1:
                raise InputError(
                    f"{place}.data: {path} holds {len(names)} tensors; token ids are the only tensor of their file: write "
                    f"one tensor of integers"
                )
            ids_ST = file.get_slice(names[0])
            shape, dtype = ids_ST.get_shape(), ids_ST.get_dtype()
            _check_form(path, shape, dtype, dtype in _INTEGERS, place)
            _check_size(path, shape, num_sequences, sequence_length, place)
            return np.asarray(ids_ST[:num_sequences, :sequence_length])
    except (SafetensorError, OSError) as e:
        raise InputError(f"{place}.data: {path} is not a whole safetensors file: {_one_line(e)}; write it again") from e


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_form(path: Path, shape: list[int], dtype: str, is_integer: bool, place: str) -> None:
    if len(shape) != 2 or not is_integer:
        raise InputError(
            f"{place}.data: {path} has shape {shape} and dtype {dtype}; token ids are integers [sequences, tokens]: write "
            f"them so"
        )


def _check_size(path: Path, shape: list[int], num_sequences: int, sequence_length: int, place: str) -> None:
    if shape[0] < num_sequences or shape[1] < sequence_length:
        raise InputError(
            f"{place}.data holds {shape[0]} sequences of {shape[1]} token ids ({path}) but num_sequences is {num_sequences} "
            f"and sequence_length {sequence_length}; lower them"
        )


def check_ids(ids_ST: Ids, vocab_size: int, place: str) -> None:
    """Raise InputError when an id is not in the model's vocabulary."""
    lowest, highest = int(ids_ST.min()), int(ids_ST.max())
    if lowest < 0 or highest >= vocab_size:
        raise InputError(
            f"{place}.data holds token ids from {lowest} to {highest} but the model's vocabulary is 0 to {vocab_size - 1}; "
            f"the ids come from another tokenizer: use the model's own tokenizer"
        )
