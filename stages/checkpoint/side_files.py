"""The small files beside the weights: which of them an export takes along, checked before any is read.

Only what belongs to tokenizer, generation, processor or licence is taken. All else is left behind and listed: it describes the
source's weights (`params.json`), another model (`adapter_config.json`), or is code for a model that transformers has itself.
"""

import ast
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from stages.contracts.errors import InputError
from stages.io.storage import is_remote
from stages.io.untrusted import MAX_SMALL_BYTES, check_regular, read_json, read_small, shown
from stages.model.tied import MODELING_FILE

PATTERNS = (
    "README.md", "added_tokens.json", "chat_template*", "generation_config.json", "merges*.txt", "*.model",
    "*preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tekken.json", "*.tiktoken",
    "tokenizer*.json", "tokenizer.model*", "vocab*",
)  # fmt: skip
FOLDERS = ("additional_chat_templates", "processor", "tokenizer")
FOLDER_SUFFIXES = (".jinja", ".json", ".model", ".tiktoken", ".txt")
_LEGAL = re.compile("licen[cs]e|notice|copying|copyright|use_policy", re.IGNORECASE)
_CODE_CONFIGS = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
_MODEL_CLASSES = ("AutoConfig", "AutoModel")
"""Beginnings of the entries of `auto_map` that name code for the model itself, which transformers never needs here."""


@dataclass(frozen=True)
class SideFiles:
    """What lies beside config, index and weights, as names relative to the folder, sorted.

    kept: files that an export takes along. left: everything else; a folder ends with a slash.
    """

    kept: tuple[str, ...]
    left: tuple[str, ...]


def is_kept(name: str) -> bool:
    """Whether a file of this name, relative to the model folder, is taken along. Code is found by `auto_map`, not by name."""
    folder, slash, rest = name.partition("/")
    if not name.isprintable():  # line ends, and bytes that are no text
        return False
    if slash:
        return folder in FOLDERS and rest.endswith(FOLDER_SUFFIXES)
    if name.endswith(".py"):
        return False
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS) or _LEGAL.search(name) is not None


def without_model_code(auto_map: Any) -> dict[str, Any]:
    """The entries of a config's `auto_map` that name code of tokenizer or processor."""
    if not isinstance(auto_map, dict):
        return {}
    return {name: value for name, value in auto_map.items() if not str(name).startswith(_MODEL_CLASSES)}


def find_side_files(folder: Path, config: Mapping[str, Any], others: set[str]) -> SideFiles:
    """Look through a model folder.

    config: its parsed `config.json`. others: names at its top that are no side files. Raises InputError for a file that would
    be taken and is no regular file, leads out of the folder, or has more than MAX_SMALL_BYTES.
    """
    kept: list[str] = []
    left: list[str] = []
    for path in folder.iterdir():
        name = path.name
        if name in others or name.startswith("."):
            continue
        is_folder = path.is_dir()
        if is_folder and name in FOLDERS:
            for inner in _walk(path):
                inner_name = f"{name}/{inner}"
                (kept if is_kept(inner_name) else left).append(inner_name)
        elif is_kept(name) and not is_folder:
            kept.append(name)
        else:
            left.append(f"{name}/" if is_folder else name)
    for name in kept:
        _check(folder, name)
    code = _code(folder, config, set(kept), {name for name in left if name.endswith(".py") and "/" not in name})
    return SideFiles(tuple(sorted({*kept, *code})), tuple(sorted(shown(name) for name in {*left} - code)))


def _walk(folder: Path) -> Iterator[str]:
    if not is_remote(folder) and folder.is_symlink():
        raise InputError(f"{folder} is a link to a folder; links are followed to files only: copy the folder there")
    for path in folder.iterdir():
        if path.is_dir():
            yield from (f"{path.name}/{name}" for name in _walk(path))
        else:
            yield path.name


def _code(folder: Path, config: Mapping[str, Any], kept: set[str], candidates: set[str]) -> set[str]:
    """Files of code that tokenizer and processor name in an `auto_map`, and those that these import from beside them."""
    named = set(_modules(without_model_code(config.get("auto_map"))))
    for name in _CODE_CONFIGS:
        values = read_json(folder / name) if name in kept else None
        if isinstance(values, dict):
            named.update(_modules(values.get("auto_map")))
    found: set[str] = set()
    while named:
        file = f"{named.pop()}.py"
        if file in candidates - found - {MODELING_FILE}:  # that name is taken by our own code
            found.add(file)
            _check(folder, file)
            named.update(_imports(read_small(folder / file)))
    return found


def _modules(auto_map: Any) -> Iterator[str]:
    """Modules in an `auto_map`, whose values are "module.Class" or lists of these; `org/name--module.Class` lies elsewhere."""
    if isinstance(auto_map, str) and "--" not in auto_map:
        yield auto_map.partition(".")[0]
    elif isinstance(auto_map, dict | list):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _modules(value)


def _imports(code: bytes) -> Iterator[str]:
    """Modules that a file imports from its own folder. Nothing is run; a file that is no Python imports nothing."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]


def _check(folder: Path, name: str) -> None:
    """Raise InputError unless a file is regular, not too large, and lies in the folder or in the hub cache it is part of."""
    path = folder / name
    if not is_remote(path):
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in _roots(folder)):
            raise InputError(
                f"{path} is a link to {real}, outside of the model folder; an export would publish that file: replace the link "
                f"by a copy, or remove it"
            )
    try:
        check_regular(path)
        num_bytes = path.stat().st_size
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e.strerror or e}; download it again, or remove it") from e
    if num_bytes > MAX_SMALL_BYTES:
        raise InputError(
            f"{path} has {num_bytes:,} bytes; a file that is copied beside the weights may have {MAX_SMALL_BYTES:,}: remove it "
            f"if it is no part of the tokenizer"
        )


def _roots(folder: Path) -> list[Path]:
    """Where the files of a model folder may lie: in it; of a snapshot in the hub's cache also among the cache's blobs."""
    real = Path(os.path.realpath(folder))
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [real, repository / "blobs", repository.parent / "blobs"]
    return [real]
