"""The documentation as a site: it builds, and a link that leads nowhere fails the build."""

from pathlib import Path

import pytest

from docs_site.repository import linked_sources, with_site_links
from tests.conftest import REPOSITORY

pytest.importorskip("mkdocs", reason="pip install 'hcsmoe[docs]'")

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build(load_config(str(REPOSITORY / "mkdocs.yml"), site_dir=str(tmp_path)))
    home = (tmp_path / "index.html").read_text()
    assert "Shrink a sparse Mixture-of-Experts" in home and 'href="cluster.html"' in home
    assert "SUPPORTED" in (tmp_path / "source" / "stages" / "model" / "families.py.html").read_text()


@pytest.mark.parametrize("link", ["nowhere.md", "methods.md#no-such-heading", "../stages/nothing.py", "#nothing-here"])
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, link: str) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "methods.md").write_text("# Methods\n")
    (docs / "page.md").write_text(f"# Page\n\n[A link]({link}).\n")
    with pytest.raises(Abort, match="1 warnings"):
        build(
            load_config(
                str(REPOSITORY / "mkdocs.yml"),
                docs_dir=str(docs),
                site_dir=str(tmp_path / "site"),
                hooks=[],
                theme={"name": "mkdocs"},
                plugins=[],
                nav=[{"Page": "page.md"}, {"Methods": "methods.md"}],
            )
        )


def test_links_of_the_repository_become_links_of_the_site() -> None:
    text = "[A](docs/texts.md#datasets), [b](stages/registry.py), [c](stages/contracts/), [d](https://x.org/y.md)\n"
    assert with_site_links("index.md", text) == (
        "[A](texts.md#datasets), [b](source/stages/registry.py.md), `stages/contracts`, [d](https://x.org/y.md)\n"
    )
    fenced = "```text\n[A](docs/texts.md)\n```\n"
    assert with_site_links("index.md", fenced) == fenced
    assert with_site_links("howto/a.md", "[b](../../cluster.yaml) [up](../texts.md)") == (
        "[b](../source/cluster.yaml.md) [up](../texts.md)"
    )
    assert linked_sources("index.md", text + fenced) == {"source/stages/registry.py.md": "stages/registry.py"}
