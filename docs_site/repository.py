"""Files of the repository on the site: some are pages of their own; every other file that a page links to is shown as code.

Pages are written for readers of the repository, so their links are paths there. `with_site_links` turns them into links of the
site.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = "docs"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
    "docker/README.md": "docker.md",
    "examples/tiny-mixtral/README.md": "tiny-mixtral.md",
}
"""Pages of the site that lie elsewhere in the repository, by their path there."""
_SOURCES = "source"
"""Folder of the site that shows files as code."""
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".ipynb": "json", ".json": "json", ".cff": "yaml"}
_FENCED = re.compile(r"^(```.*?^```[^\n]*\n)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")


def source_of(page: str) -> str:
    """Path in the repository of a page of the site."""
    by_page = {site_path: path for path, site_path in PAGES.items()}
    return by_page.get(page, f"{DOCS}/{page}")


def page_of(path: str) -> str | None:
    """Page of the site that shows a file of the repository; None where there is no such file."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"{_SOURCES}/{path}.md" if (ROOT / path).is_file() else None


def _links(page: str, text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Links of a page to files of the repository, with their paths there."""
    folder = posixpath.dirname(source_of(page))
    for match in _LINK.finditer(text):
        yield match, posixpath.normpath(posixpath.join(folder, match["path"]))


def linked_sources(page: str, text: str) -> dict[str, str]:
    """Files that a page links to and that are shown as code: paths in the repository by those on the site."""
    found = {page_of(path): path for part in _FENCED.split(text)[::2] for _, path in _links(page, part)}
    return {shown: path for shown, path in found.items() if shown is not None and shown.startswith(f"{_SOURCES}/")}


def source_page(path: str) -> str:
    """A page that shows a file of the repository."""
    text = (ROOT / path).read_text(encoding="utf-8")
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def with_site_links(page: str, text: str) -> str:
    """A page with links that lead to pages of the site. A link to a folder of code becomes its name."""
    parts = _FENCED.split(text)
    parts[::2] = [_relinked(page, part) for part in parts[::2]]
    return "".join(parts)


def _relinked(page: str, text: str) -> str:
    targets = {match.start(): path for match, path in _links(page, text)}

    def replace(match: re.Match[str]) -> str:
        path = targets[match.start()]
        if (ROOT / path).is_dir():
            return f"`{path}`"
        site_path = page_of(path)
        if site_path is None:
            return match[0]
        return f"{match['text']}({posixpath.relpath(site_path, posixpath.dirname(page) or '.')}{match['anchor'] or ''})"

    replacer: Callable[[re.Match[str]], str] = replace
    return _LINK.sub(replacer, text)
