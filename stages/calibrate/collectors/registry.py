"""Registry of collectors: those that every run uses, and by name those that only some methods need."""

from collections.abc import Iterable

from stages.calibrate.collectors.base import Collector
from stages.calibrate.collectors.gated_output import GatedOutput
from stages.calibrate.collectors.gated_output_norm import GatedOutputNorm
from stages.calibrate.collectors.largest_down_output import LargestDownOutput
from stages.calibrate.collectors.neuron_activations import NeuronActivations
from stages.calibrate.collectors.neuron_importance import NeuronImportance
from stages.calibrate.collectors.output_gram import OutputGram
from stages.calibrate.collectors.output_norm import OutputNorm
from stages.calibrate.collectors.output_sum import OutputSum
from stages.calibrate.collectors.router_scores import RouterScores
from stages.calibrate.collectors.sampled_outputs import SampledOutputs
from stages.calibrate.collectors.usage import Usage
from stages.calibrate.collectors.weight_gram import WeightGram
from stages.contracts.errors import InputError
from stages.contracts.evidence import Column

DEFAULT: tuple[Collector, ...] = (Usage(), GatedOutputNorm(), RouterScores(), OutputSum())
"""Used by every run. Their columns share one file, in the order of this tuple."""
FURTHER: dict[str, Collector] = {
    collector.name: collector
    for collector in (
        OutputNorm(),
        GatedOutput(),
        NeuronImportance(),
        LargestDownOutput(),
        SampledOutputs(),
        WeightGram(),
        OutputGram(),
        NeuronActivations(),
    )
}
"""Used only if a method requires one of their columns. Each column has a separate file."""

DEFAULT_COLUMNS: tuple[Column, ...] = tuple(column for collector in DEFAULT for column in collector.columns)


def register(collector: Collector) -> None:
    """Register a collector. Its name and its columns must not be taken."""
    known = (*DEFAULT, *FURTHER.values())
    assert collector.name not in {one.name for one in known}, f"{collector.name} is taken"
    columns = {column.name for one in known for column in one.columns} | {"statistics", "groups"}  # names of files
    assert columns.isdisjoint(column.name for column in collector.columns), f"a column of {collector.name} is taken"
    FURTHER[collector.name] = collector


def collectors(further: Iterable[str]) -> tuple[Collector, ...]:
    """The collectors that every run uses, then the named ones."""
    return (*DEFAULT, *(FURTHER[name] for name in further))


def gathering(required: Iterable[str]) -> tuple[str, ...]:
    """Sorted names of the further collectors that gather the required columns.
    Raises InputError for a column of no collector."""
    by_column = {column.name: collector.name for collector in FURTHER.values() for column in collector.columns}
    default = {column.name for column in DEFAULT_COLUMNS}
    names = set()
    for column in required:
        if column in by_column:
            names.add(by_column[column])
        elif column not in default:
            raise InputError(f"no collector gathers {column}; there are {', '.join(sorted({*default, *by_column}))}")
    return tuple(sorted(names))
