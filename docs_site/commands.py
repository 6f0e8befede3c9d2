"""Page of the commands, from the functions that the command line is made of."""

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_args, get_origin

from typer.models import ArgumentInfo, OptionInfo

from docs_site.markdown import escaped, page, table
from pipeline.cli import app

_BEGINNING = """
`hcsmoe COMMAND --help` prints the same in a terminal. `python -m pipeline` is another name of `hcsmoe`. What the exit code of
a command says is on the page [Exit codes](exit-codes.md).

`NO_COLOR=1` switches colours off. `hcsmoe --install-completion` sets up completion in your shell.
"""


@dataclass(frozen=True)
class Parameter:
    """An argument or option of a command. name: as it is typed, with what follows it. default: empty where there is none."""

    name: str
    is_argument: bool
    default: str
    meaning: str


def commands() -> dict[str, Callable[..., Any]]:
    """The function of every command, by the command's name."""
    found = {
        info.name or info.callback.__name__: info.callback for info in app.registered_commands if info.callback is not None
    }
    return dict(sorted(found.items()))


def parameters(command: Callable[..., Any]) -> list[Parameter]:
    """Arguments and options of a command, in order."""
    return [_parameter(one) for one in inspect.signature(command, eval_str=True).parameters.values()]


def commands_page() -> str:
    """The page."""
    lines = page("Commands", "docs_site/commands.py", _BEGINNING)
    for name, command in commands().items():
        lines += _described(name, command)
    return "\n".join(lines)


def _described(name: str, command: Callable[..., Any]) -> Iterator[str]:
    found = parameters(command)
    arguments = [one.name for one in found if one.is_argument]
    yield from (f"## hcsmoe {name}", "", escaped(inspect.cleandoc(command.__doc__ or "")), "")
    yield from (
        "```text",
        " ".join(("hcsmoe", name, *arguments, *(["[OPTIONS]"] if len(found) > len(arguments) else []))),
        "```",
        "",
    )
    if found:
        yield from table(
            ("argument or option", "default", "meaning"),
            [(f"`{one.name}`", one.default, escaped(one.meaning)) for one in found],
        )


def _parameter(parameter: inspect.Parameter) -> Parameter:
    kind, info = get_args(parameter.annotation)[:2]
    if isinstance(info, ArgumentInfo):
        return Parameter(str(info.metavar), True, "", info.help or "")
    assert isinstance(info, OptionInfo)
    given = [info.default, *(info.param_decls or ())]  # in Annotated, typer takes the first name for a default
    names = ", ".join(one for one in given if isinstance(one, str)) or f"--{parameter.name.replace('_', '-')}"
    value = _value(kind)
    return Parameter(f"{names} {value}".rstrip(), False, _default(parameter.default), info.help or "")


def _value(kind: Any) -> str:
    """What is typed behind an option: nothing for a switch, its choices, or the kind of value."""
    if isinstance(kind, types.UnionType):
        kind = next(one for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is list:
        kind = get_args(kind)[0]
    if kind is bool:
        return ""
    return (
        "|".join(str(one.value) for one in kind) if issubclass(kind, Enum) else {int: "NUMBER", str: "TEXT"}.get(kind, "PATH")
    )


def _default(value: object) -> str:
    if value is None or value is False or value == "":
        return ""
    return f"`{value.value if isinstance(value, Enum) else value}`"
