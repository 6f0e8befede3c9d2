"""The walks of docs/architecture.md: at most nine files each, none twice, and what they name is there."""

import ast
import re

import pytest

from tests.conftest import REPOSITORY

_PAGE = (REPOSITORY / "docs" / "architecture.md").read_text().partition("## Three walks")[2]
WALKS = [block for block in re.split(r"\n(?=\*\*)", _PAGE) if block.startswith("**")]


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.splitlines()[0].strip("*"))
def test_a_walk_has_nine_stations_at_most_and_each_is_there(walk: str) -> None:
    stations = re.findall(r"^\d+\. `([^`]+)`: (.+?)(?=\n\d+\. |\Z)", walk, flags=re.DOTALL | re.MULTILINE)
    files = [file for file, _ in stations]
    assert 5 <= len(files) == len(set(files)) <= 9
    for file, text in stations:
        tree = ast.parse((REPOSITORY / file).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        named = [part for quoted in re.findall(r"`([A-Za-z_.]+)`", text) for part in quoted.split(".") if part != "py"]
        first = [part for part in named if part in names]
        assert first, f"{file} has none of {named}"


def test_there_are_three() -> None:
    assert len(WALKS) == 3
