"""Makes text safe to print in a terminal or a log: names, messages and paths may come from anybody.

Control characters, terminal escapes, direction marks and similar characters are printed as Python writes them (`\\x1b`). rich
never interprets such text as markup or emoji codes.
"""

import unicodedata
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

_INDENT = "  "


def printable(text: object) -> str:
    """Text as one line. Every character that is not printable is escaped, line breaks included."""
    return "".join(one if _is_seen(one) else one.encode("unicode_escape").decode() for one in str(text))


def _is_seen(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def printable_lines(text: object) -> str:
    """Text as several printable lines. All lines but the first are indented, so that no file name or message with line breaks
    can imitate a message of this program."""
    return f"\n{_INDENT}".join(printable(line) for line in str(text).split("\n"))


def add_row(table: Table, cells: Iterable[object]) -> None:
    """Add a row of plain text to a table."""
    table.add_row(*(Text(printable(cell)) for cell in cells))


def show(console: Console, item: Table | object) -> None:
    """Print a table, or a text without wrapping and without colours."""
    if isinstance(item, Table):
        console.print(item, highlight=False)
    else:
        console.print(Text(printable_lines(item)), highlight=False, soft_wrap=True)
