"""`compare`: the variants of a run side by side, from its report."""

from pathlib import Path
from typing import Any

from pipeline.display.comparison import Comparison
from pipeline.display.task_table import TaskTable
from stages.contracts.errors import InputError
from stages.contracts.paths import REPORT_FILE
from stages.contracts.settings import RunConfig
from stages.io.storage import absolute
from stages.io.untrusted import read_json


def comparisons(config: RunConfig) -> tuple[list[Comparison], TaskTable | None]:
    """Of a finished run, by every measure of its report; and its scores of tasks, if it has tasks.
    Raises InputError where there is no report, or one that cannot be read."""
    path = absolute(config.run_dir) / REPORT_FILE
    if not path.exists():
        raise InputError(f"{path} does not exist; run the run file first: `hcsmoe run` writes it when all stages are finished")
    report: Any = read_json(path)
    try:
        return Comparison.all_of(report), TaskTable.of(report)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(f"{Path(path)} is no report of this version; run the run file again, which writes it anew") from e
