"""What a run prints at its end."""

from collections.abc import Iterator

from pydantic import JsonValue
from rich.table import Table

from pipeline.display.comparison import Comparison
from pipeline.display.tables import certainty_lines, result_table, super_expert_lines
from pipeline.display.task_table import TaskTable
from pipeline.driver.run_state import RunResult
from stages.contracts.paths import REPORT_PAGE_FILE


def result_values(result: RunResult) -> dict[str, JsonValue]:
    """For JSON."""
    return {
        "run_dir": str(result.report_path.parent),
        "models": result.report["models"],
        "warnings": result.report["warnings"],
        "num_run": result.num_run,
        "num_reused": result.num_reused,
        "elapsed_s": result.elapsed_s,
        "shortfalls": list(result.shortfalls),
    }


def shown_result(result: RunResult, has_variants: bool) -> Iterator[Table | str]:
    """Lines and tables for the terminal: of the checkpoints if there are any, and how much was run."""
    if result.report["models"]:
        yield from _shown_models(result, has_variants)
    yield f"{result.num_run} units run, {result.num_reused} reused, {result.elapsed_s:.1f} s"


def _shown_models(result: RunResult, has_variants: bool) -> Iterator[Table | str]:
    report, run_dir = result.report, result.report_path.parent
    yield result_table(report)
    if (scores := TaskTable.of(report)) is not None:
        yield scores.table()
    if has_variants:
        for first in Comparison.all_of(report)[:1]:
            yield first.source_line
            yield first.table()
    yield from super_expert_lines(report)
    yield from certainty_lines(report)
    yield f"report       {result.report_path}"
    yield f"page         {run_dir / REPORT_PAGE_FILE}"
    yield f"checkpoints  {run_dir / 'models'}"
