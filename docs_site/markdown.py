"""Pieces of Markdown that generated pages are made of."""

import re
from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """Text for a cell of a table: on one line, without what ends the cell."""
    return " ".join(text.split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table, with an empty line after it."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows), ""]


def escaped(text: str) -> str:
    """Text whose characters mean nothing to Markdown outside of its code spans."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([*_<\[])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def page(title: str, made_by: str, *paragraphs: str) -> list[str]:
    """First lines of a generated page. made_by: the module that makes it, for who wants to change it."""
    lines = [f"# {title}", "", f"<!-- Made by {made_by} when the site is built. -->", ""]
    for paragraph in paragraphs:
        lines += [paragraph.strip(), ""]
    return lines
