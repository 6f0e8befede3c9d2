"""Reads untrusted YAML: sizes are bounded, and a key that occurs twice is an error instead of being dropped."""

import math
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pipeline.display.printing import printable
from stages.contracts.errors import InputError
from stages.io.untrusted import read_small

MAX_FILE_BYTES = 1 << 20
MAX_NODES = 50_000
"""Bound for the number of values in a file.
The target of an alias counts at every use, because a few hundred bytes of aliases can expand to any number of values."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but infinite and NaN numbers are errors, because no setting may be infinite."""

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = float(super().construct_yaml_float(node))
        if not math.isfinite(value):
            raise ValueError(f"{node.value} in line {_line(node)} is not a finite number; write a finite one")
        return value


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def read_yaml(path: Path, kind: str) -> Any:
    """The content of a YAML file. kind: what the file is, for messages ("run file").

    Raises InputError in one line for a file that is not regular, too large, not YAML, or has a key twice.
    """
    place = f"{kind} {path}"
    try:
        text = read_small(path, MAX_FILE_BYTES).decode("utf-8")
    except OSError as e:
        raise InputError(f"{place} cannot be read: {e.strerror}; give the path of a file that exists and can be read") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{place} is not YAML: {e}; write it as UTF-8") from e
    except InputError as e:
        raise InputError(f"{place} cannot be read: {e}; give the path of a {kind}") from e
    return parse_yaml(text, place)


def parse_yaml(text: str, place: str) -> Any:
    """The value of a YAML text. place: where the text stands, for messages. Raises InputError in one line."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, place, {}, set())
        _check_keys(node, place, "", set())
        return loader.construct_document(node)
    except RecursionError as e:
        raise InputError(f"{place} is nested too deeply; write it with fewer levels") from e
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # a date of month 13 is a ValueError
        if isinstance(e, InputError):
            raise
        raise InputError(f"{place} is not YAML: {' '.join(str(e).split())}; correct it") from e
    finally:
        if loader is not None:
            loader.dispose()


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _count(node: yaml.Node, place: str, counts: dict[int, int], above: set[int]) -> int:
    """Number of values in a node with aliases expanded. Each node is visited once."""
    known = counts.get(id(node))
    if known is not None:
        return known
    if id(node) in above:
        raise InputError(f"{place}: the value in line {_line(node)} contains itself by an alias; write the value out")
    above.add(id(node))
    counts[id(node)] = count = 1 + sum(_count(child, place, counts, above) for child in _children(node))
    above.remove(id(node))
    if count > MAX_NODES:
        raise InputError(f"{place} has more than {MAX_NODES:,} values, aliases written out; write fewer")
    return count


def _check_keys(node: yaml.Node, place: str, where: str, seen: set[int]) -> None:
    """Raise InputError for a key that occurs twice in one section, where PyYAML would silently drop the first."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if not isinstance(node, yaml.MappingNode):
        for child in _children(node):
            _check_keys(child, place, where, seen)
        return
    lines: dict[Hashable, int] = {}
    for key, value in node.value:
        name = printable(key.value) if isinstance(key, yaml.ScalarNode) else "a key"
        full = f"{where}.{name}" if where else name
        if isinstance(key, yaml.ScalarNode):
            first = lines.get((key.tag, key.value))
            if first is not None:
                raise InputError(f"{place}: {full} is given twice, in lines {first} and {_line(key)}; keep one of them")
            lines[key.tag, key.value] = _line(key)
        _check_keys(value, place, full, seen)
