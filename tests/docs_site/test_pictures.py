"""The pictures in docs/images are those that are drawn."""

import xml.etree.ElementTree

import pytest

from docs_site.pictures import FOLDER, PICTURES


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_as_drawn(name: str) -> None:
    drawn = PICTURES[name]()
    assert (FOLDER / name).read_text() == drawn, "run python -m docs_site.pictures"
    xml.etree.ElementTree.fromstring(drawn)
