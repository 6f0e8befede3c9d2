"""Runnable blocks of pages: a test runs every fenced block behind a comment `<!-- run -->`, all in one folder, in order.

`<!-- run: exit 2 -->` expects another exit code. `<!-- file: NAME -->` writes the block that follows to a file first.
"""

import contextlib
import io
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from docs_site.repository import DOCS, ROOT

PAGES = ("getting-started.md", "howto/laptop.md", "howto/one-gpu.md", "howto/batch.md", "howto/resume.md")
"""Pages with runnable blocks, in the order in which they are run; a test finds those that are missing here."""
_BLOCK = re.compile(
    r"^(?P<indent> *)<!-- (?P<marker>run|file)(?:: (?P<more>[^>]+?))? -->\n"
    r" *```(?P<language>\w+)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
COMMAND = "hcsmoe"


@dataclass(frozen=True)
class Block:
    """A block. file: name of the file that it is written to; empty if it is run. exit_code: that it has to end with."""

    page: str
    line: int
    language: str
    text: str
    file: str = ""
    exit_code: int = 0

    @property
    def commands(self) -> Sequence[Sequence[str]]:
        """The commands of a block of shell lines."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: str) -> Iterator[Block]:
    """Runnable blocks of a page, and files for them, in order."""
    text = (ROOT / DOCS / page).read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        more = match["more"] or ""
        body = textwrap.dedent(match["text"])
        if match["marker"] == "file":
            yield Block(page, line, match["language"], body, file=more)
        else:
            yield Block(page, line, match["language"], body, exit_code=int(more.removeprefix("exit ") or 0))


def run_block(block: Block, folder: Path, names: dict[str, object]) -> str:
    """Run a block in a folder, in this process, and return what it prints. names: variables of all blocks of Python.

    Raises RuntimeError with that text for another exit code than the block's.
    """
    output = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), names)
        else:
            for words in block.commands:
                code = _exit_code(words)
                if code != block.exit_code:
                    raise RuntimeError(f"{block.page}:{block.line}: {words} ended with exit code {code}:\n{output.getvalue()}")
    return output.getvalue()


def _exit_code(words: Sequence[str]) -> int:
    """Run a command of hcsmoe here. Raises ValueError for any other command."""
    from pipeline.cli import main

    if words[0] != COMMAND:
        raise ValueError(f"{words[0]} is run by no test; a runnable block has commands of {COMMAND} alone")
    before = sys.argv
    sys.argv = list(words)
    try:
        main()
    except SystemExit as e:
        return int(e.code or 0)
    finally:
        sys.argv = before
    return 0
