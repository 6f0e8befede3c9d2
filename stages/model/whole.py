"""A whole checkpoint as transformers loads it, for people who use what a run has made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.io.storage import is_remote
from stages.model.adapter import check_tied_code
from stages.model.tied import is_tied


def load_model(folder: Path, options: Mapping[str, Any]) -> PreTrainedModel:
    """A checkpoint in evaluation mode. options: of `from_pretrained`; dtype is the checkpoint's unless they say otherwise.

    Raises InputError for a folder on object storage, and for a tied checkpoint whose code is not what this version writes.
    """
    _check_is_local(folder)
    checkpoint = Checkpoint(folder)
    tied = is_tied(checkpoint.config)
    if tied:
        check_tied_code(checkpoint)
    given = {"dtype": "auto", "trust_remote_code": tied, **options}
    return AutoModelForCausalLM.from_pretrained(str(folder), **given).eval()  # type: ignore[no-any-return]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises InputError for a folder on object storage, or without a tokenizer."""
    _check_is_local(folder)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise InputError(
            f"{folder} has no tokenizer that transformers can load: {e}; put the tokenizer files of the checkpoint there"
        ) from e


def _check_is_local(folder: Path) -> None:
    if is_remote(folder):
        raise InputError(f"{folder} is on object storage, where transformers reads nothing; copy the folder to a disk first")
