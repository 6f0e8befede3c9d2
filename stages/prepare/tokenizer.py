"""Loads the checkpoint's tokenizer with transformers. Any exception of the libraries becomes a one-line error."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.io.untrusted import MAX_SMALL_BYTES, check_regular, read_json
from stages.prepare.chat import Conversation
from stages.prepare.reading import Document
from stages.prepare.tokens import Tokens

_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = (
    "tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_PANIC = "PanicException"
_NO_CACHE = {"TIKTOKEN_CACHE_DIR": ""}
"""Switches off tiktoken's cache, which identifies a vocabulary by its path and would be read even if the file has changed."""


class Tokenizer:
    """Turns documents into token ids.

    Raises InputError for a tokenizer that is missing, damaged or of an unknown kind. Code that comes with the checkpoint runs
    only if trust_remote_code is set.
    """

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool) -> None:
        folder = checkpoint.local_folder
        for name in (*_JSON, *_FILES):
            _check_file(folder / name)
        found = [name for name in _FILES if (folder / name).exists()]
        settings = f" with {_JSON[0]}" if (folder / _JSON[0]).exists() else ""
        self._name = f"{checkpoint.folder / found[0]}{settings}" if found else str(checkpoint.folder)
        fails = "cannot be loaded as a tokenizer" if found else "has no tokenizer that transformers can load"
        with self._reported(fails), _environment(_NO_CACHE):
            self._encode = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)

    def encode(self, document: Document) -> Tokens:
        """Token ids of a document, int64 [T], including the tokenizer's own special tokens, or those of its chat template."""
        what = "fails as a tokenizer on a document of the text"
        if isinstance(document, Conversation):
            self._check_template()
            what = f"cannot apply its chat template to {document.place}"
        with self._reported(what):
            ids = self._ids(document)
            ids_T = np.asarray(ids)
        if not isinstance(ids, list) or ids_T.ndim != 1 or (ids and ids_T.dtype.kind != "i"):
            raise InputError(
                f"{self._name} returns {type(ids).__name__} of shape {list(ids_T.shape)} and {ids_T.dtype} for "
                f"a document; a list of token ids is needed"
            )
        return ids_T.astype(np.int64)

    def _ids(self, document: Document) -> Any:
        if isinstance(document, str):
            return self._encode(document, verbose=False)["input_ids"]
        encoded: Any = self._encode.apply_chat_template(
            list(document.messages), tools=list(document.tools) or None, tokenize=True, return_dict=True
        )
        return encoded["input_ids"]

    def _check_template(self) -> None:
        if not self._encode.chat_template:
            raise InputError(
                f"{self._name} has no chat template, which format chat needs; use the tokenizer of the model's chat version, "
                f"or set format to text"
            )

    @contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        """Context only for calls of libraries: `tokenizers` raises bare Exception or panics, and transformers any exception."""
        try:
            yield
        except (MemoryError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:
            if not isinstance(e, Exception) and type(e).__name__ != _PANIC:
                raise
            reason = " ".join(str(e).split()) or type(e).__name__
            if isinstance(e, KeyError):
                reason = f"{reason} is not there"
            raise InputError(
                f"{self._name} {what}: {reason}; use the tokenizer files that belong to the checkpoint, from a version of "
                f"transformers that is not newer than this one"
            ) from e


def _check_file(path: Path) -> None:
    """Raise InputError for a file that is not regular, and for settings that are not a JSON object.
    A missing file is no error."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        check_regular(path)
        if path.stat().st_size > MAX_SMALL_BYTES:
            raise InputError(
                f"{path} has {path.stat().st_size:,} bytes; at most {MAX_SMALL_BYTES:,} are read of a tokenizer file"
            )
        if path.name in _JSON and not isinstance(read_json(path), dict):
            raise InputError(f"{path} is not a JSON object; use the tokenizer files that belong to the checkpoint")
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}") from e


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
