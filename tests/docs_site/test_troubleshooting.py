"""Every error message is on the page of troubleshooting, with what to do about it."""

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs_site.messages import FAILURE, Message, all_messages
from docs_site.troubleshooting import troubleshooting_page
from tests.conftest import REPOSITORY

ERRORS = {"InputError", "RunFailed", "LockLost"}
PACKAGES = [REPOSITORY / "pipeline", REPOSITORY / "stages"]
SOURCES = [REPOSITORY / "hcsmoe.py", *(path for folder in PACKAGES for path in sorted(folder.rglob("*.py")))]


def own_words(path: Path) -> Iterator[str]:
    """Longer pieces of the texts that errors are made with, by a walk that knows nothing of how the page is made."""
    for node in ast.walk(ast.parse(path.read_text())):
        made = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS
        raised = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
        if (not made and not raised) or (raised and ast.unparse(node.exc).startswith("AssertionError")):  # type: ignore[union-attr]
            continue
        error = node.exc if raised else node  # type: ignore[union-attr]
        defaults = {id(one) for choice in ast.walk(error) if isinstance(choice, ast.BoolOp) for one in ast.walk(choice)}
        for one in ast.walk(error):
            if isinstance(one, ast.Constant) and isinstance(one.value, str) and id(one) not in defaults:
                yield from (piece.strip() for piece in re.split(r"[;:]|\n|\. ", one.value) if len(piece.split()) > 2)


@pytest.fixture(scope="module")
def page() -> str:
    """Words of the page, as they are in the code."""
    return _plain(re.sub(r"\\([*_<\[])", r"\1", html.unescape(troubleshooting_page())))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def test_no_message_is_missing(page: str) -> None:
    pieces = {_plain(piece): path for path in SOURCES for piece in own_words(path)}
    assert len(pieces) > 500
    missing = {words: path.relative_to(REPOSITORY).as_posix() for words, path in pieces.items() if words not in page}
    assert not missing, "\n".join(f"{path}: {words}" for words, path in missing.items())


def test_every_message_says_what_to_do() -> None:
    found = all_messages()
    assert len(found) > 350
    lacking = [one for one in found if one.kind != FAILURE and not one.parts[1]]
    assert not lacking, "\n".join(f"{one.path}, {one.function}: {one.text}" for one in lacking)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a is 3; use at most 2", ("a is 3", "use at most 2")),
        ("a is 3: it was 2: set it to 2, or leave it out", ("a is 3: it was 2", "set it to 2, or leave it out")),
        ("there is no method <name>; known methods: <names>", ("there is no method <name>", "known methods: <names>")),
        ("a is useless; it was used before", ("a is useless; it was used before", "")),
        ("<name>: use of it is unknown", ("<name>", "use of it is unknown")),
    ],
)
def test_a_remedy_is_told_from_the_problem(text: str, parts: tuple[str, str]) -> None:
    assert Message(text, "InputError", "", "").parts == parts


def test_a_message_of_a_function_that_makes_errors_is_whole() -> None:
    texts = {one.text for one in all_messages() if one.path == "stages/prepare/lines.py"}
    assert "<place>.data: <path>, <where> is nested too deeply; write it with fewer levels" in texts


def test_a_constant_is_written_out_and_a_choice_shown() -> None:
    texts = {one.text for one in all_messages()}
    assert any("model.safetensors.index.json names <files>" in one for one in texts)
    assert any("the file is (truncated|longer than it says)" in one for one in texts)
