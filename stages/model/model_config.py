"""Makes transformers' config objects from raw configs: errors become one line, and no foreign code is run.

Semi-private names of transformers are used here; `tests/stages/test_model_config.py` checks them.
"""

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from stages.checkpoint.folder import CONFIG_FILE, Checkpoint
from stages.contracts.errors import InputError
from stages.io.untrusted import shown
from stages.model.config_checks import without_lists

COMPUTES = ("bfloat16", "float16", "float32", "float64")
"""Dtypes in which a model can be built and run."""

# Config settings that change the form of a forward's result, not its values.
_RETURNS = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
    "use_cache": False,
}

# Exceptions of Python, torch and transformers for an unusable value: wrong type, size, name or combination.
# Excluded are MemoryError, interrupts and a full GPU (a RuntimeError), because they are no fault of the input.
_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, StrictDataclassError,
    TypeError, ValueError,
)  # fmt: skip
_MAX_REASON = 400
_CLASS_NAMES = re.compile(r"\b\w+Error: ")


@contextmanager
def reads_config(folder: Path, what: str) -> Iterator[None]:
    """Context for calls of transformers on an untrusted config: their exceptions become an InputError of one line.

    what: the action of transformers, for the message, such as "build this model".
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except _REFUSALS as e:
        raise InputError(
            f"{folder / CONFIG_FILE}: transformers {transformers.__version__} cannot {what}: {_reason(e)}; "
            f"restore the config, or use a model that this version of transformers knows"
        ) from e


def _reason(error: BaseException) -> str:
    """transformers' own message on one line, without exception names, which mean nothing to a user."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = _CLASS_NAMES.sub("", " ".join(text.split()))
    if isinstance(error, KeyError) and " " not in text:
        text = f"{text!r} is not known or missing"
    if not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.line} ({Path(frame.filename).name}, line {frame.lineno})"
    return text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."


def load_config(checkpoint: Checkpoint) -> Any:
    """The config as transformers' own class, without settings that make a forward return another form or run other code.

    Code that comes with a checkpoint (`auto_map`) is never run here. Neither is an attention implementation that a config
    names: it may be code from the hub.
    """
    with reads_config(checkpoint.folder, "read this config"):
        raw = PreTrainedConfig._decode_special_floats(without_lists(checkpoint.config))
        config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(raw)
        sections = (config, *(getattr(config, name) for name in config.sub_configs))
    for section in (section for section in sections if section is not None):
        for name, value in _RETURNS.items():
            if hasattr(section, name):
                setattr(section, name, value)
        section._attn_implementation = None
        section._experts_implementation = None
    return config


def stated_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The dtype that a config names. Raises InputError for one that a model cannot compute in."""
    text = checkpoint.config.get("text_config")
    sections = (checkpoint.config, text if isinstance(text, dict) else {})
    found = [(key, section.get(key)) for section in sections for key in ("dtype", "torch_dtype")]
    key, named = next(((key, value) for key, value in found if value is not None), ("", None))
    if named is None:
        return None
    if not isinstance(named, str) or named.removeprefix("torch.") not in COMPUTES:
        place = f"{checkpoint.folder / CONFIG_FILE}: {key} is {shown(repr(named))}"
        raise InputError(f"{place}; a model computes in {', '.join(COMPUTES)}: set it to the one that it was trained in")
    return getattr(torch, named.removeprefix("torch."))  # type: ignore[no-any-return]


def writable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A raw config in which NaN and infinity, which JSON cannot represent, are replaced as transformers replaces them."""
    return PreTrainedConfig._encode_special_floats(dict(config))  # type: ignore[no-any-return]
