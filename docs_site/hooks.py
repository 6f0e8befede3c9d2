"""What MkDocs calls while it builds the site (`hooks` in mkdocs.yml)."""

import posixpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs_site.generated import GENERATED
from docs_site.repository import PAGES, ROOT, linked_sources, source_page, with_site_links

SCRIPTS = ROOT / ".venv" / "site-scripts"
"""`make docs` puts the scripts there that draw diagrams and search. A build without them has readers fetch them elsewhere."""
_DIAGRAMS, _SEARCH = "mermaid.min.js", "iframe-worker.js"
_FOLDER = "assets"
_DIAGRAM = "```mermaid\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let the search of a site that is opened from a disk use our copy of its script."""
    if (SCRIPTS / _SEARCH).exists():
        config.extra["polyfills"] = [f"{_FOLDER}/{_SEARCH}"]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that do not lie in docs/."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    for page, made in GENERATED.items():
        files.append(File.generated(config, page, content=made()))
    sources: dict[str, str] = {}
    for file in files.documentation_pages():
        sources |= linked_sources(file.src_uri, file.content_string)
    for page, path in sorted(sources.items()):
        files.append(File.generated(config, page, content=source_page(path)))
    for script in SCRIPTS.glob("*.js"):
        files.append(File.generated(config, f"{_FOLDER}/{script.name}", abs_src_path=str(script)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links of the repository into links of the site, and load what draws diagrams where there are any."""
    here = page.file.src_uri
    text = with_site_links(here, markdown)
    if _DIAGRAM not in text or files.get_file_from_path(f"{_FOLDER}/{_DIAGRAMS}") is None:
        return text
    script = posixpath.relpath(f"{_FOLDER}/{_DIAGRAMS}", posixpath.dirname(here) or ".")
    return f'{text}\n<script src="{script}"></script>\n'
