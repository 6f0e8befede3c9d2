"""Experts that stay as they are, whatever the method: what finding them takes, and their file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from stages.contracts.arrow import read_table, write_table
from stages.io.files import WrittenFile

LARGEST = "largest_down_output"
"""Column of evidence by which super experts are found."""
REQUIRED: Mapping[str, frozenset[str]] = {"none": frozenset(), "super": frozenset({LARGEST})}
"""Columns of evidence by value of `clustering.protect`."""

PROTECT_UNIT = "protected"
"""Name of the unit that finds a target's protected experts."""


@dataclass(frozen=True)
class ProtectFacts:
    """experts: the protected ones, (layer, expert), ascending."""

    experts: tuple[tuple[int, int], ...]


_SCHEMA = pa.schema(
    [pa.field("layer", pa.int32(), False), pa.field("expert", pa.int32(), False)],
    metadata={"table": "an expert that is neither merged nor dropped a row"},
)


def write_protected(path: Path, experts: Mapping[int, tuple[int, ...]]) -> WrittenFile:
    """Write the protected experts of all layers. experts: by layer."""
    rows = [(layer, expert) for layer, found in sorted(experts.items()) for expert in found]
    return write_table(path, {"layer": [layer for layer, _ in rows], "expert": [expert for _, expert in rows]}, _SCHEMA)


def read_protected(path: Path) -> dict[int, tuple[int, ...]]:
    """Protected experts by layer; layers without any are left out."""
    table = read_table(path)
    found: dict[int, tuple[int, ...]] = {}
    for layer, expert in zip(table["layer"].to_pylist(), table["expert"].to_pylist(), strict=True):
        found[layer] = (*found.get(layer, ()), expert)
    return found
