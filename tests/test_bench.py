"""The benchmark of collectors measures every one of them, and the page has a row for each."""

from pathlib import Path

from bench.collectors import measure
from bench.models import generate
from bench.page import write_page
from stages.calibrate.collectors.registry import FURTHER


def test_the_table_of_collectors_has_each_as_a_multiple_of_the_plain_pass(tmp_path: Path) -> None:
    found = measure("tiny", generate("tiny", tmp_path / "tiny"), 1, 2)
    assert all(size > 0 for size in found["evidence_bytes"].values()), "each has written its evidence"
    found |= {"wall_s": {**found["wall_s"], "": [2.0, 4.0], "weight_gram": [3.0, 10.0]}}
    on = dict.fromkeys(("date", "commit", "cpu", "bf16", "note", "python", "torch", "transformers", "gpu"), "x")
    counts = {"threads": 1, "repeats": 2, "load": 0.0, "num_cpus": 2, "memory_bytes": 2**30}
    write_page({"collectors": {"tiny": {**found, "on": {**on, **counts}}}}, tmp_path / "page.md")
    rows = [line for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| tiny |") and "`" in line]
    assert [row.split("`")[1] for row in rows] == list(FURTHER)
    (row,) = [row for row in rows if "`weight_gram`" in row]
    assert "| 2.00 [1.50 .. 2.50] |" in row
