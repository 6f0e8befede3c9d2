"""Which collectors there are: those of every run, and by name those that only some methods need."""

from collections.abc import Iterable

from stages.calibrate.collectors.base import Collector
from stages.calibrate.collectors.gated_output import GatedOutput
from stages.calibrate.collectors.gated_output_norm import GatedOutputNorm
from stages.calibrate.collectors.output_norm import OutputNorm
from stages.calibrate.collectors.output_sum import OutputSum
from stages.calibrate.collectors.router_scores import RouterScores
from stages.calibrate.collectors.usage import Usage
from stages.contracts.errors import InputError
from stages.contracts.evidence import Column

DEFAULT: tuple[Collector, ...] = (Usage(), GatedOutputNorm(), RouterScores(), OutputSum())
"""Gathered by every run, in one file; in the order of the file's metadata."""
FURTHER: dict[str, Collector] = {collector.name: collector for collector in (OutputNorm(), GatedOutput())}
"""Gathered where a method requires one of their columns; each column has a file of its own."""

DEFAULT_COLUMNS: tuple[Column, ...] = tuple(column for collector in DEFAULT for column in collector.columns)


def register(collector: Collector) -> None:
    """Make a collector known. Names of collectors and columns must be new."""
    known = (*DEFAULT, *FURTHER.values())
    assert collector.name not in {one.name for one in known}, f"{collector.name} is taken"
    columns = {column.name for one in known for column in one.columns} | {"statistics", "groups"}  # names of files
    assert columns.isdisjoint(column.name for column in collector.columns), f"a column of {collector.name} is taken"
    FURTHER[collector.name] = collector


def collectors(further: Iterable[str]) -> tuple[Collector, ...]:
    """Those of every run, then others by name."""
    return (*DEFAULT, *(FURTHER[name] for name in further))


def gathering(required: Iterable[str]) -> tuple[str, ...]:
    """Names, sorted, of the further collectors whose columns are required. Raises InputError for a column that none gathers."""
    by_column = {column.name: collector.name for collector in FURTHER.values() for column in collector.columns}
    default = {column.name for column in DEFAULT_COLUMNS}
    names = set()
    for column in required:
        if column in by_column:
            names.add(by_column[column])
        elif column not in default:
            raise InputError(f"no collector gathers {column}; there are {', '.join(sorted({*default, *by_column}))}")
    return tuple(sorted(names))
