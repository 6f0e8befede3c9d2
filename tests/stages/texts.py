"""Texts of one repeated word, and what is drawn from them, for tests of prepare."""

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer

from stages.prepare.spec import TextArgs
from stages.prepare.units import sequences
from tests.conftest import REPOSITORY

EXAMPLE = REPOSITORY / "examples" / "tiny-mixtral"
COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def model_folder(folder: Path) -> Path:
    """Config and tokenizer of the example: all that prepare reads for a text."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder / name)
    return folder


def drawn(data: Path | str | Sequence[Path], model: Path = EXAMPLE, **settings: Any) -> "np.ndarray[Any, Any]":
    """Token ids [S, T] as prepare draws them."""
    files = [str(data)] if isinstance(data, Path | str) else [str(path) for path in data]
    defaults = {"text_field": "text", "num_sequences": 1, "sequence_length": 8, "seed": 0}
    place = {"place": "calibration", "model": str(model), "trust_remote_code": False, "data": tuple(files)}
    found = sequences(TextArgs(**{**place, **defaults, **settings}))
    return found.part(0, len(found)).astype(np.int32)


def words(data: Path | str | Sequence[Path], **settings: Any) -> set[str]:
    """The words of what is drawn."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    return set(" ".join(str(tokenizer.decode(row)) for row in drawn(data, **settings)).split())


def json_line(word: str, **more: Any) -> str:
    """A document that says one word often enough for a sequence."""
    return json.dumps({**more, "text": f" {word}" * 40}) + "\n"
