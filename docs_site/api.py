"""Page of the Python API, from the signatures and docstrings behind `hcsmoe.__all__`."""

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import hcsmoe
from docs_site.markdown import escaped, page, table
from pipeline.api.asked import PathName, TargetLike, Text

_ALIASES = {
    inspect.formatannotation(alias): name
    for alias, name in ((Text, "Text"), (TargetLike, "TargetLike"), (PathName, "PathName"))
}
"""Names for types that would fill lines, longest first."""
_PACKAGES = re.compile(r"(?:pipeline|stages|pathlib|collections\.abc|typing)\.(?:\w+\.)*")


def api_page() -> str:
    """The page."""
    lines = page(
        "Python API",
        "docs_site/api.py",
        "```python\nimport hcsmoe\n```",
        "It checks, plans and runs as the commands do. [The quickstart notebook](../../examples/quickstart.ipynb) uses it.",
    )
    lines += table(
        ("type", "what it is"), [(f"`{name}`", f"`{_shortened(alias)}`") for alias, name in reversed(_ALIASES.items())]
    )
    objects = {name: getattr(hcsmoe, name) for name in hcsmoe.__all__ if name != "__version__"}
    functions = {name: one for name, one in objects.items() if inspect.isfunction(one)}
    errors = {name: one for name, one in objects.items() if inspect.isclass(one) and issubclass(one, Exception)}
    for name, function in functions.items():
        lines += _function(f"hcsmoe.{name}", function, "##")
    for name, one in objects.items():
        if name not in functions and name not in errors:
            lines += _class(f"hcsmoe.{name}", one)
    for name, error in errors.items():
        lines += (f"## hcsmoe.{name}", "", escaped(inspect.getdoc(error) or ""), "")
    return "\n".join(lines)


def explained(text: str, names: Iterable[str]) -> tuple[str, Mapping[str, str]]:
    """A docstring without its sentences `name: meaning`, and these by name. Names may share one: `one, two: units`."""
    name = "|".join(map(re.escape, names))
    begins = re.compile(rf"(?:^|(?<=[.:] ))(?P<names>(?:{name})(?:, (?:{name}))*): ")
    meanings: dict[str, str] = {}
    rest = []
    for paragraph in text.split("\n\n"):
        words = " ".join(paragraph.split())
        found = list(begins.finditer(words)) if name else []
        rest.append(words[: found[0].start()] if found else words)
        for match, following in zip_longest(found, found[1:]):
            meaning = words[match.end() : following.start() if following else len(words)]
            meanings |= dict.fromkeys(match["names"].split(", "), meaning.strip())
    return "\n\n".join(part.strip() for part in rest if part.strip()), meanings


def _function(name: str, function: Any, heading: str) -> Iterator[str]:
    signature = inspect.signature(function)
    shown = [one for one in signature.parameters.values() if one.name != "self"]
    intro, meanings = explained(inspect.getdoc(function) or "", [one.name for one in shown])
    yield from (f"{heading} {name}", "", "```python", _signature(name, signature), "```", "", escaped(intro), "")
    if meanings:
        yield from table(("argument", "meaning"), [(f"`{key}`", escaped(meaning)) for key, meaning in meanings.items()])


def _signature(name: str, signature: inspect.Signature) -> str:
    """A call, one argument a line where there are several."""
    parts = []
    is_keyword = False
    for one in signature.parameters.values():
        if one.name == "self":
            continue
        if one.kind is one.KEYWORD_ONLY and not is_keyword:
            parts.append("*")
            is_keyword = True
        default = "" if one.default is one.empty else f" = {one.default!r}"
        parts.append(f"{'**' if one.kind is one.VAR_KEYWORD else ''}{one.name}: {_type(one.annotation)}{default}")
    returned = _type(signature.return_annotation)
    inside = "\n    " + ",\n    ".join(parts) + ",\n" if len(parts) > 2 else ", ".join(parts)
    return f"{name.rpartition('.')[2]}({inside}) -> {returned}"


def _type(annotation: Any) -> str:
    """A type as the page names it."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    for alias, name in _ALIASES.items():
        text = text.replace(alias, name)
    return re.sub(r"\bRunPlan\b", "Plan", _shortened(text))


def _shortened(text: str) -> str:
    return _PACKAGES.sub("", text).replace("os.PathLike", "PathLike")


def _class(name: str, kind: type) -> Iterator[str]:
    fields = dataclasses.fields(kind)
    intro, meanings = explained(inspect.getdoc(kind) or "", [one.name for one in fields])
    yield from (f"## {name}", "", escaped(intro), "")
    rows = [(f"`{one.name}`", f"`{_type(one.type)}`", escaped(meanings.get(one.name, ""))) for one in fields]
    yield from table(("field", "type", "meaning"), rows)
    for key, member in vars(kind).items():
        if isinstance(member, property):
            yield from (f"`{key}`: {escaped(' '.join((inspect.getdoc(member) or '').split()))}", "")
        elif inspect.isfunction(member) and not key.startswith("_"):
            yield from _function(f"{name}.{key}", member, "###")
