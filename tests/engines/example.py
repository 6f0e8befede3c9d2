"""A run of the example by two methods, for tests that show its exports to engines."""

import json
from collections.abc import Iterator
from pathlib import Path

from tests.runs import FinishedRun

_REPOSITORY = Path(__file__).parents[2]
_RUN = """
model: {root}/examples/tiny-mixtral
run_dir: {run_dir}
calibration:
  data: [{root}/examples/text/calibration-fiction.jsonl]
  num_sequences: 4
  sequence_length: 128
clustering: {{num_experts: [4]}}
variants: [hc-smoe, slim]
"""


def example_run(folder: Path) -> FinishedRun:
    """Exports `hc-smoe-4e-stock`, `hc-smoe-4e-tied` and `slim-4e-stock`."""
    run_file = folder / "run.yaml"
    run_file.write_text(_RUN.format(root=_REPOSITORY, run_dir=folder / "run"))
    return FinishedRun.of(run_file)


def prompts() -> Iterator[str]:
    """Eight beginnings of held-out documents."""
    for domain in ("fiction", "scripture"):
        lines = (_REPOSITORY / f"examples/text/heldout-{domain}.jsonl").read_text().splitlines()
        yield from (json.loads(line)["text"][:100] for line in lines[:4])
