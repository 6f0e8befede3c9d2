"""Selects the small files beside the weights that an export includes, and checks them before any is read.

Included are files of the tokenizer, generation, processor or licence. All others are left out and listed: they describe the
source's weights (`params.json`) or another model (`adapter_config.json`), or are model code that transformers already has.
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
"""Prefixes of the `auto_map` entries that name model code, which transformers never needs here."""


@dataclass(frozen=True)
class SideFiles:
    """Files beside config, index and weights: sorted names relative to the folder.

    kept: files that an export includes. left: all others; names of folders end with a slash.
    """

    kept: tuple[str, ...]
    left: tuple[str, ...]


def is_kept(name: str) -> bool:
    """Whether an export includes a file of this name (relative to the model folder).
    Code files are found by `auto_map` instead."""
    folder, slash, rest = name.partition("/")
    if not name.isprintable():  # line breaks, and bytes that are not text
        return False
    if slash:
        return folder in FOLDERS and rest.endswith(FOLDER_SUFFIXES)
    if name.endswith(".py"):
        return False
    return any(fnmatchcase(name, pattern) for pattern in PATTERNS) or _LEGAL.search(name) is not None


def without_model_code(auto_map: Any) -> dict[str, Any]:
    """The entries of a config's `auto_map` that name tokenizer or processor code."""
    if not isinstance(auto_map, dict):
        return {}
    return {name: value for name, value in auto_map.items() if not str(name).startswith(_MODEL_CLASSES)}


def find_side_files(folder: Path, config: Mapping[str, Any], others: set[str]) -> SideFiles:
    """Search a model folder for side files.

    config: its parsed `config.json`. others: top-level names that are not side files. Raises InputError if a file to include is
    not regular, leads out of the folder, or is larger than MAX_SMALL_BYTES.
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
    """Code files named by the tokenizer or processor in an `auto_map`, and the neighbouring files that these import."""
    named = set(_modules(without_model_code(config.get("auto_map"))))
    for name in _CODE_CONFIGS:
        values = read_json(folder / name) if name in kept else None
        if isinstance(values, dict):
            named.update(_modules(values.get("auto_map")))
    found: set[str] = set()
    while named:
        file = f"{named.pop()}.py"
        if file in candidates - found - {MODELING_FILE}:  # the tied export writes its own code under that name
            found.add(file)
            _check(folder, file)
            named.update(_imports(read_small(folder / file)))
    return found


def _modules(auto_map: Any) -> Iterator[str]:
    """Modules in an `auto_map`: values are "module.Class" or lists of these. `org/name--module.Class` is in another
    repository."""
    if isinstance(auto_map, str) and "--" not in auto_map:
        yield auto_map.partition(".")[0]
    elif isinstance(auto_map, dict | list):
        for value in auto_map.values() if isinstance(auto_map, dict) else auto_map:
            yield from _modules(value)


def _imports(code: bytes) -> Iterator[str]:
    """Modules that a file imports from its own folder, found without running it. A file that is not Python has none."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]


def _check(folder: Path, name: str) -> None:
    """Raise InputError unless a file is regular, not too large, and inside the folder or the folder's hub cache."""
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
    """Folders in which a model's files may lie: its own folder; for a snapshot in the hub's cache also the cache's blobs."""
    real = Path(os.path.realpath(folder))
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        return [real, repository / "blobs", repository.parent / "blobs"]
    return [real]
