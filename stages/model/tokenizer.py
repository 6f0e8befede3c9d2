"""Loads the checkpoint's tokenizer with transformers. Any exception of the libraries becomes a one-line error."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.io.untrusted import MAX_SMALL_BYTES, check_regular, read_json

_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FILES = (
    "tokenizer.json", "tokenizer.model", "tiktoken.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
_PANIC = "PanicException"
_NO_CACHE = {"TIKTOKEN_CACHE_DIR": ""}
"""Switches off tiktoken's cache, which identifies a vocabulary by its path and would be read even if the file has changed."""


class LoadedTokenizer:
    """plain: transformers' own tokenizer. name: of its files, for messages.

    Raises InputError for a tokenizer that is missing, damaged or of an unknown kind. Code that comes with the checkpoint runs
    only if trust_remote_code is set.
    """

    def __init__(self, checkpoint: Checkpoint, trust_remote_code: bool) -> None:
        folder = checkpoint.local_folder
        for name in (*_JSON, *_FILES):
            _check_file(folder / name)
        found = [name for name in _FILES if (folder / name).exists()]
        settings = f" with {_JSON[0]}" if (folder / _JSON[0]).exists() else ""
        self.name = f"{checkpoint.folder / found[0]}{settings}" if found else str(checkpoint.folder)
        fails = "cannot be loaded as a tokenizer" if found else "has no tokenizer that transformers can load"
        with self.reported(fails), _environment(_NO_CACHE):
            self.plain = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)

    @contextmanager
    def reported(self, what: str) -> Iterator[None]:
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
                f"{self.name} {what}: {reason}; use the tokenizer files that belong to the checkpoint, from a version of "
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
                f"{path} has {path.stat().st_size:,} bytes; at most {MAX_SMALL_BYTES:,} are read of a tokenizer file; use "
                f"the tokenizer files that belong to the checkpoint"
            )
        if path.name in _JSON and not isinstance(read_json(path), dict):
            raise InputError(f"{path} is not a JSON object; use the tokenizer files that belong to the checkpoint")
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror}; change its permissions, or download it again") from e


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
