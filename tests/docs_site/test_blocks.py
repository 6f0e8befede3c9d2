"""Blocks of the documentation that are marked runnable run as written, in the order of a reader."""

import signal
from pathlib import Path

import pytest

from docs_site.blocks import PAGES, Block, blocks_of, run_block
from tests.conftest import REPOSITORY

BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def test_all_runnable_blocks_run(tmp_path: Path) -> None:
    """One test: a block reads what an earlier one has made."""
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    names: dict[str, object] = {}
    before = signal.getsignal(signal.SIGTERM)
    try:
        printed = {f"{block.page}:{block.line}": run_block(block, tmp_path, names) for block in BLOCKS}
    finally:
        signal.signal(signal.SIGTERM, before)
    text = "\n".join(printed.values())
    assert "8 experts, top-2" in text and "tiny-mixtral-reap-4e-stock" in text
    assert "tiny-mixtral-reap-6e-stock" in text and "refused: examples/tiny-mixtral.yaml: clustering.linkage" in text


def test_every_page_with_runnable_blocks_is_listed() -> None:
    docs = REPOSITORY / "docs"
    marked = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md") if "<!-- run" in path.read_text()}
    assert marked <= set(PAGES)
    for page in PAGES:
        num_marked = (docs / page).read_text().count("<!-- run") + (docs / page).read_text().count("<!-- file")
        assert num_marked == len(list(blocks_of(page))) > 0, f"{page}: a marked block is not a fenced one"


def test_a_block_that_fails_or_is_no_command_of_ours_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended with exit code 2:\nerror: .*nowhere is not a run directory"):
        run_block(Block("page.md", 1, "bash", "hcsmoe status nowhere\n"), tmp_path, {})
    assert "nowhere" in run_block(Block("page.md", 1, "bash", "hcsmoe status nowhere\n", exit_code=2), tmp_path, {})
    with pytest.raises(ValueError, match="rm is run by no test"):
        run_block(Block("page.md", 1, "bash", "rm -r x\n"), tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        run_block(Block("page.md", 1, "python", "1 / 0\n"), tmp_path, {})
