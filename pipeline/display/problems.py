"""Formats validation errors of settings as one line."""

from pydantic import ValidationError

from pipeline.display.printing import printable

_MAX_SHOWN = 200


def problems(error: ValidationError) -> str:
    """One line that names every wrong key and its value."""
    lines = []
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"] if not str(part).startswith(("tuple[", "constrained-", "union-"))]
        place = printable(".".join(parts))
        given = problem["input"]
        shown = f" (it is {_shortened(given)})" if isinstance(given, str | int | float | bool) or given is None else ""
        if problem["type"] == "extra_forbidden":
            lines.append(f"{place} is not a setting: correct its name, or remove it")
        elif problem["type"] == "missing":
            lines.append(f"{place} is missing: add it")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{place}: {message}{shown}" if place else message)
    return "; ".join(dict.fromkeys(lines))


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
