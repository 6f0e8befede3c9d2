"""Calibration and evaluation sets: sequences of token ids from text or from ids.

Documents are taken in a seeded order, tokenised as the tokenizer does (with its own special tokens), joined, and cut to
sequences of T tokens; the sequences asked for are drawn from the pool by the same seed. Reading stops once the pool
holds POOL_FACTOR times what is asked, so a large dataset is not read whole.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.errors import InputError

POOL_FACTOR = 16
ID_SUFFIXES = (".npy", ".safetensors")
LOADERS = {".txt": "text", ".text": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_token_ids(path: Path) -> "np.ndarray[Any, Any]":
    """Token ids [S, T] from a `.npy` file or from the only tensor of a safetensors file."""
    if path.suffix == ".npy":
        try:
            ids = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as e:
            raise InputError(f"{path} is not a plain numeric .npy file: {e}") from e
    else:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
        except SafetensorError as e:
            raise InputError(f"{path} is not a whole safetensors file: {e}") from e
        if len(tensors) != 1:
            raise InputError(f"{path} holds {len(tensors)} tensors; token ids are the only tensor of their file")
        (ids,) = tensors.values()
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(
            f"{path} has shape {list(ids.shape)} and dtype {ids.dtype}; token ids are integers [sequences, tokens]"
        )
    return np.asarray(ids)


def read_texts(data: Sequence[str], text_field: str, seed: int, revision: str | None, place: str) -> Iterator[str]:
    """Documents in a seeded order, from text/jsonl/parquet files, or from one dataset of the hub (`org/name[:split]`).

    Raises InputError for files that are damaged, of an unknown kind, or without text in text_field.
    """
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises, and what it raises is told below
    suffixes = {Path(name).suffix for name in data}
    try:
        if suffixes <= set(LOADERS) and len({LOADERS[suffix] for suffix in suffixes}) == 1:
            loader = LOADERS[next(iter(suffixes))]
            options = {"sample_by": "document"} if loader == "text" else {}
            dataset = datasets.load_dataset(loader, data_files=list(data), split="train", **options)
        elif len(data) == 1 and not Path(data[0]).exists():
            name, _, split = data[0].partition(":")
            dataset = datasets.load_dataset(name, split=split or "train", revision=revision)
        else:
            kinds = ", ".join([*LOADERS, *ID_SUFFIXES])
            raise InputError(f"{place}.data: {', '.join(data)}: files must be of one kind; known: {kinds}")
    except InputError:
        raise
    except (datasets.exceptions.DatasetsError, ValueError, OSError, StopIteration) as e:
        reason = str(e.__cause__ or e).strip() or "it holds nothing"  # datasets raises StopIteration for an empty file
        raise InputError(f"{place}.data: {', '.join(data)} cannot be read: {reason.splitlines()[0]}") from e
    if text_field not in dataset.column_names:
        fields = ", ".join(dataset.column_names)
        raise InputError(f"{place}.data: {data[0]} has no field {text_field!r}; it has {fields}: set {place}.text_field")
    for row in dataset.shuffle(seed=seed):
        if not isinstance(row[text_field], str):
            kind = type(row[text_field]).__name__
            raise InputError(f"{place}.data: {data[0]}: field {text_field!r} holds a value of type {kind} where text is due")
        yield row[text_field]


def draw_sequences(
    documents: Iterator[Sequence[int]], num_sequences: int, sequence_length: int, seed: int, place: str
) -> "np.ndarray[Any, Any]":
    """Token ids int32 [num_sequences, sequence_length] drawn without replacement from the joined documents.

    Raises InputError when the documents hold fewer tokens than asked for.
    """
    pool: list[int] = []
    wanted = num_sequences * sequence_length
    for document in documents:
        pool.extend(document)
        if len(pool) >= POOL_FACTOR * wanted:
            break
    if len(pool) < wanted:
        raise InputError(
            f"{place}.data holds {len(pool):,} tokens but num_sequences {num_sequences} x sequence_length {sequence_length} "
            f"= {wanted:,}; give more text or lower one of them"
        )
    windows = np.asarray(pool[: len(pool) // sequence_length * sequence_length], dtype=np.int32).reshape(-1, sequence_length)
    chosen = np.random.default_rng(seed).choice(len(windows), size=num_sequences, replace=False)
    return windows[np.sort(chosen)]


def crop_ids(ids: "np.ndarray[Any, Any]", num_sequences: int, sequence_length: int, place: str) -> "np.ndarray[Any, Any]":
    """The first num_sequences rows and sequence_length columns of given ids. Raises InputError when there are fewer."""
    if ids.shape[0] < num_sequences or ids.shape[1] < sequence_length:
        raise InputError(
            f"{place}.data holds {ids.shape[0]} sequences of {ids.shape[1]} token ids but num_sequences is {num_sequences} "
            f"and sequence_length {sequence_length}; lower them"
        )
    return ids[:num_sequences, :sequence_length].astype(np.int32)


def check_ids(ids: "np.ndarray[Any, Any]", vocab_size: int, place: str) -> None:
    """Raise InputError when an id is not one of the model's."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise InputError(
            f"{place}.data holds token ids from {ids.min()} to {ids.max()} but the model's vocabulary is 0 to "
            f"{vocab_size - 1}; the ids come from another tokenizer"
        )
