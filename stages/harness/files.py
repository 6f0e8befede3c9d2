"""Which files of a folder of task files each task reads, found without lm-evaluation-harness, for the keys of tasks.

The harness's rules: every `*.yaml` below the folder defines a task, a group or nothing; `include` merges other files in;
`!function module.name` is code beside the file; a group lists tasks, groups and tags.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from stages.contracts.errors import InputError
from stages.io.untrusted import read_small

_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_DATA_KEYS = ("dataset_path", "dataset_kwargs")


@dataclass(frozen=True)
class _Function:
    """Stands for code that a file names."""

    name: str


class _Loader(yaml.SafeLoader):
    """Reads any tag, and runs no code."""


def _tagged(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> object:
    if isinstance(node, yaml.ScalarNode):
        return _Function(f"{loader.construct_scalar(node)}")
    return loader.construct_mapping(node) if isinstance(node, yaml.MappingNode) else loader.construct_sequence(node)  # type: ignore[arg-type]


_Loader.add_multi_constructor("!", _tagged)


@dataclass
class TaskFolder:
    """A folder of task files. place: where the run file names it, for messages.

    Raises InputError for a folder that is missing or cannot be read, and for a file that is not YAML: the harness would pass it
    over, and not know its task.
    """

    folder: Path
    place: str
    _configs: dict[Path, tuple[Mapping[str, Any], frozenset[Path]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise InputError(f"{self.place}: {self.folder} is not a folder; give a folder with task files")

    def files_of(self, task: str) -> list[Path]:
        """Files that a task, group or tag depends on: its own, those that it includes or lists, data files that these name,
        and, where one of them names code, every file of the folder that is not a task file, since code may read any. None for
        a task that the folder does not define."""
        found: set[Path] = set()
        has_code = False
        for name in self._reached(task):
            for path in self._defined[name]:
                config, files = self._read(path)
                found |= files
                found.update(self._data_files(config))
                has_code |= any(isinstance(value, _Function) for value in _values(config))
        if has_code:
            found.update(path for path in self._all if path.suffix != ".yaml")
        return sorted(found)

    @cached_property
    def _all(self) -> list[Path]:
        paths = (path for path in self.folder.rglob("*") if not path.is_dir() and _IGNORED.isdisjoint(path.parts))
        return sorted(paths, key=lambda path: path.as_posix())

    def _data_files(self, config: Mapping[str, Any]) -> Iterator[Path]:
        """Local files that a task reads its documents from: those that it names, and those of folders of this one."""
        for value in _values([config.get(key) for key in _DATA_KEYS]):
            path = Path(value) if isinstance(value, str) and value and "\0" not in value else None
            if path is not None and path.is_absolute():
                if path.is_file():
                    yield path
                elif path.is_relative_to(self.folder):
                    yield from (one for one in self._all if one.is_relative_to(path))

    @cached_property
    def _defined(self) -> dict[str, list[Path]]:
        """Files that define a name: one of a task or group, several of a tag."""
        defined: dict[str, list[Path]] = {}
        tags: dict[str, list[Path]] = {}
        for path in self._all:
            if path.suffix == ".yaml":
                config, _ = self._read(path)
                name = config.get("group", config.get("task"))
                if isinstance(name, str):
                    defined.setdefault(name, [path])
                    for tag in _as_list(config.get("tag")):
                        tags.setdefault(str(tag), []).append(path)
        return {**tags, **defined}

    def _reached(self, task: str) -> list[str]:
        """The names that a name leads to, itself included, as far as the folder defines them."""
        found: dict[str, None] = {}
        ahead = [task]
        while ahead:
            name = ahead.pop()
            if name in found or name not in self._defined:
                continue
            found[name] = None
            for path in self._defined[name]:
                ahead += _members(self._read(path)[0])
        return list(found)

    def _read(self, path: Path, outer: Sequence[Path] = ()) -> tuple[Mapping[str, Any], frozenset[Path]]:
        """What a file says together with those that it includes, and the paths of all of them."""
        if path in self._configs:
            return self._configs[path]
        try:
            own = _Loader(read_small(path)).get_single_data()
        except InputError as e:
            raise InputError(f"{self.place}: {e}") from e
        except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
            raise InputError(f"{self.place}: {path} is not YAML: {_reason(e)}; mend it, or take it out of the folder") from e
        except OSError as e:
            raise InputError(
                f"{self.place}: {path} cannot be read: {e.strerror or e}; change its permissions, or take it out of the folder"
            ) from e
        merged: dict[str, Any] = {}
        files = {path}
        own = own if isinstance(own, dict) else {}
        for name in _as_list(own.pop("include", None)):
            included = (path.parent / str(name)).resolve()
            if included.is_file() and included not in (path, *outer):
                config, others = self._read(included, (path, *outer))
                merged |= config
                files |= others
        self._configs[path] = {**merged, **own}, frozenset(files)
        return self._configs[path]


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _members(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of the tasks and groups that a group lists, also in groups within it."""
    listed = config.get("task")
    if isinstance(listed, list):
        yield from (value for key, value in _pairs(listed) if key in ("", "task", "group") and isinstance(value, str))


def _values(value: object) -> Iterator[object]:
    """All values within a value."""
    return (one for _, one in _pairs(value))


def _pairs(value: object) -> Iterator[tuple[str, object]]:
    """All values within a value, with the key of each; values of lists have the list's key. Aliases are followed once: they may
    refer to what holds them, and a few of them may stand for billions of values."""
    ahead, seen = [("", value)], set[int]()
    while ahead:
        key, one = ahead.pop()
        if not isinstance(one, Mapping | list):
            yield key, one
        elif id(one) not in seen:
            seen.add(id(one))
            ahead += (
                [(str(name), inner) for name, inner in one.items()] if isinstance(one, Mapping) else [(key, i) for i in one]
            )


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, {error.problem}"
    return " ".join(str(error).split())
