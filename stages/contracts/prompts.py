"""Prompts that a task lets a model continue, in slices, and the texts that a model generates."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from stages.contracts.arrow import read_table, write_table
from stages.io.files import WrittenFile


class Prompt(NamedTuple):
    """context: the text to continue. settings: how, as the task states it for the harness: a JSON object."""

    context: str
    settings: str


_PROMPTS = pa.schema(
    [pa.field("context", pa.string(), False), pa.field("settings", pa.string(), False)],
    metadata={"table": "one prompt a row", "settings": "JSON object"},
)
_TEXTS = pa.schema([pa.field("text", pa.string(), False)], metadata={"table": "one prompt a row"})


def prompts_file(part_dir: Path, number: int) -> Path:
    """Prompts of one slice."""
    return part_dir / f"prompts-{number:04d}.arrow"


def texts_file(part_dir: Path, number: int) -> Path:
    """Texts with which a model continues the prompts of one slice."""
    return part_dir / f"texts-{number:04d}.arrow"


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> WrittenFile:
    """Write the prompts of one slice."""
    return write_table(path, {name: [getattr(one, name) for one in prompts] for name in Prompt._fields}, _PROMPTS)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file of `write_prompts`."""
    table = read_table(path)
    return [Prompt(*values) for values in zip(*(table[name].to_pylist() for name in Prompt._fields), strict=True)]


def write_texts(path: Path, texts: Sequence[str]) -> WrittenFile:
    """Write the texts of one slice, in the order of its prompts."""
    return write_table(path, {"text": list(texts)}, _TEXTS)


def read_texts(path: Path) -> list[str]:
    """Read a file of `write_texts`."""
    texts: list[str] = read_table(path)["text"].to_pylist()
    return texts
