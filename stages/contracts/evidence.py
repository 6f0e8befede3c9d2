"""Evidence: the calibration result of one MoE layer, sums over the calibration tokens by expert.

There are three kinds of files: `statistics` (always), `groups` (output sums by group of sequences; only under sampling), and
one file for each further column that a method requires, named after the column.

Dimensions: T tokens, D hidden size, E experts, G groups of sequences.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, list_column, read_lists, read_table, write_table
from stages.contracts.errors import InputError
from stages.contracts.paths import column_file, groups_file, statistics_file
from stages.io.files import WrittenFile

OverDomains = Literal["sum", "max", "same", "tokens", "weighted_tokens"]


@dataclass(frozen=True)
class Column:
    """A column of evidence: one value or array per expert.

    meaning: description for the file's metadata; "{tokens}" in it becomes "all T tokens", or "tokens" if tokens are sampled.
    shape: dimensions of an array, such as "[D]". dtype: float64, float32 or int64. over_domains: what its value over several
    domains is: their weighted sum, their maximum, or the value of each, for what does not depend on tokens; for values token by
    token the tokens of all domains, and whether they are multiplied by the domain's weight.
    """

    name: str
    meaning: str
    shape: str = ""
    dtype: str = "float64"
    over_domains: OverDomains = "sum"

    def described(self, is_sampled: bool) -> str:
        """Shape and meaning as one text."""
        return f"{self.shape} {self.meaning}".lstrip().replace("{tokens}", "tokens" if is_sampled else "all T tokens")


@dataclass(frozen=True)
class OutputGroups:
    """Output sums by group of sequences, output_sum_EGD, and the number of sampled tokens in each group's sum."""

    num_tokens_G: Array
    output_sum_EGD: Array


@dataclass(frozen=True)
class LayerEvidence:
    """The evidence of one MoE layer. `evidence["gate_sum"]` is a column; its first axis is the experts.

    num_tokens: calibration tokens. num_output_tokens: number of those tokens that un-routed columns cover. columns: by name;
    each collector documents its own. groups: None without sampling. over_domains: of the columns that are no sums, how values
    of several domains make one.
    """

    layer: int
    num_tokens: int
    num_output_tokens: int
    num_experts: int
    columns: Mapping[str, Array] = field(repr=False)
    groups: OutputGroups | None = field(default=None, repr=False)
    over_domains: Mapping[str, OverDomains] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Array:
        """A column. Raises InputError if no collector has gathered it."""
        if name not in self.columns:
            raise InputError(
                f"layer {self.layer}: the evidence has no column {name}, only {', '.join(sorted(self.columns))}; name it "
                "among the columns that the method requires, so that calibrate gathers it"
            )
        return self.columns[name]


PAIRED_AXES = {"router_logit_gram": 1, "output_gram": 1, "weight_gram": 1, "sampled_output_gram": 2}
"""Columns that have a second axis of experts, and which. The first axis is the experts in all columns."""

_KEYS = ("layer", "expert", "num_tokens", "num_output_tokens")
_LEADING = ("layer", "expert", "num_tokens", "num_routed_tokens", "gate_sum", "num_output_tokens", "output_sum")
"""First columns of a statistics file. The others follow in the order of their collectors."""
_DESCRIBED_LAST = "output_sum"
_COMMON = {
    "dtype": "float64 sums, int64 counts",
    "units": "the model's own: outputs as the MoE block adds them up, logits as the router gives them",
    "num_tokens": "calibration tokens, T",
}


def _type(column: Column, values: Array) -> pa.DataType:
    scalar = {"float64": pa.float64(), "float32": pa.float32(), "int64": pa.int64()}[column.dtype]
    return pa.list_(scalar, values[0].size) if column.shape else scalar


def _arrow(column: Column, values: Array) -> Any:
    return list_column(values.reshape(len(values), -1), _type(column, values).value_type) if column.shape else values


def _filled(evidence: LayerEvidence) -> dict[str, Array]:
    """The columns with the row's layer and expert, and the numbers of tokens in its sums."""
    return {
        "layer": np.full(evidence.num_experts, evidence.layer, dtype=np.int32),
        "expert": np.arange(evidence.num_experts, dtype=np.int32),
        "num_tokens": np.full(evidence.num_experts, evidence.num_tokens, dtype=np.int64),
        "num_output_tokens": np.full(evidence.num_experts, evidence.num_output_tokens, dtype=np.int64),
    }


def write_statistics(path: Path, evidence: LayerEvidence, columns: Sequence[Column], is_sampled: bool) -> WrittenFile:
    """Write the columns that every calibration gathers."""
    by_name = {column.name: column for column in columns}
    keys = [name for name in _KEYS if is_sampled or name != "num_output_tokens"]
    first = [name for name in _LEADING if name in keys or name in by_name]
    order = [*first, *(column.name for column in columns if column.name not in first)]
    filled = _filled(evidence)
    types = {name: pa.from_numpy_dtype(values.dtype) for name, values in filled.items()}
    types |= {column.name: _type(column, evidence[column.name]) for column in columns}
    fields = [pa.field(name, types[name], False) for name in order]
    lists = ", ".join(f"{name} [{evidence[name][0].size}]" for name in order if name in by_name and by_name[name].shape)
    described = {column.name: column.described(is_sampled) for column in columns}
    last = {_DESCRIBED_LAST: described.pop(_DESCRIBED_LAST)}
    if is_sampled:
        last = {"num_output_tokens": "the tokens that output_sum runs over, a sample of T", **last}
    metadata = {
        "table": "statistics of one MoE layer, one expert a row",
        "layer": str(evidence.layer),
        "num_experts": str(evidence.num_experts),
        "hidden_size": str(evidence["output_sum"].shape[1]),
        "shapes": f"{lists}, all else a scalar",
        **_COMMON,
        **described,
        **last,
    }
    values = {name: _arrow(by_name[name], evidence[name]) if name in by_name else filled[name] for name in order}
    return write_table(path, values, pa.schema(fields, metadata=metadata))


def write_column(path: Path, evidence: LayerEvidence, column: Column) -> WrittenFile:
    """Write one column that only some methods require."""
    filled = {name: values for name, values in _filled(evidence).items() if name in ("layer", "expert", "num_tokens")}
    values = evidence[column.name]
    fields = [pa.field(name, pa.from_numpy_dtype(keys.dtype), False) for name, keys in filled.items()]
    metadata = {
        "table": "a column of evidence on one MoE layer, one expert a row",
        "layer": str(evidence.layer),
        "num_experts": str(evidence.num_experts),
        "shape": json.dumps(values.shape[1:]),
        **({} if column.over_domains == "sum" else {"over_domains": column.over_domains}),
        **_COMMON,
        column.name: column.described(evidence.groups is not None),
    }
    schema = pa.schema([*fields, pa.field(column.name, _type(column, values), False)], metadata=metadata)
    return write_table(path, {**filled, column.name: _arrow(column, values)}, schema)


def groups_schema(hidden_size: int) -> pa.Schema:
    """Columns of a file of output sums by group of sequences."""
    return pa.schema(
        [
            pa.field("group", pa.int32(), False),
            pa.field("expert", pa.int32(), False),
            pa.field("num_sampled_tokens", pa.int64(), False),
            pa.field("output_sum", pa.list_(pa.float64(), hidden_size), False),
        ],
        metadata={
            "table": "one expert of one group of sequences a row",
            "num_sampled_tokens": "sampled tokens of the group's sequences",
            "output_sum": "[D] sum over those of E_e(x), not gated; x is the input of the MoE block",
        },
    )


def write_groups(path: Path, groups: OutputGroups) -> WrittenFile:
    """Write output sums by group of sequences, ordered by group and then by expert."""
    num_experts, num_groups, hidden_size = groups.output_sum_EGD.shape
    sums = np.ascontiguousarray(groups.output_sum_EGD.transpose(1, 0, 2)).reshape(-1, hidden_size)
    columns = {
        "group": np.repeat(np.arange(num_groups, dtype=np.int32), num_experts),
        "expert": np.tile(np.arange(num_experts, dtype=np.int32), num_groups),
        "num_sampled_tokens": np.repeat(groups.num_tokens_G, num_experts),
        "output_sum": list_column(sums, pa.float64()),
    }
    return write_table(path, columns, groups_schema(hidden_size))


def read_groups(path: Path) -> OutputGroups:
    """Read one layer's output sums by group of sequences."""
    table = read_table(path)
    num_groups = table["group"][-1].as_py() + 1
    num_tokens_G = table["num_sampled_tokens"].to_numpy().reshape(num_groups, -1)[:, 0]
    output_sum_GED = read_lists(table, "output_sum").reshape(num_groups, len(table) // num_groups, -1)
    return OutputGroups(num_tokens_G, output_sum_GED.transpose(1, 0, 2))


def _columns(table: pa.Table, path: Path) -> dict[str, Array]:
    """The evidence columns of a file. Raises InputError for a value that is not finite."""
    found = {}
    for name in table.column_names:
        if name in _KEYS:
            continue
        is_list = pa.types.is_fixed_size_list(table.schema.field(name).type)
        found[name] = read_lists(table, name) if is_list else table[name].to_numpy()
        if not np.isfinite(found[name]).all():
            expert = int(np.argwhere(~np.isfinite(found[name]))[0, 0])
            raise InputError(f"{path}: {name} of expert {expert} is not finite; delete the file and calibrate again")
    return found


def read_evidence(calibrate_dir: Path, layer: int, required: Iterable[str] = ()) -> LayerEvidence:
    """Read the evidence that calibrate has written for one layer. required: columns that this run has gathered beyond the
    default ones.

    Output sums by group are read if the statistics have a column num_output_tokens, which shows that tokens were sampled.
    """
    path = statistics_file(calibrate_dir, layer)
    table = read_table(path)
    is_sampled = "num_output_tokens" in table.column_names
    columns = _columns(table, path)
    over_domains: dict[str, OverDomains] = {}
    for name in sorted(set(required) - set(columns)):
        further_path = column_file(calibrate_dir, layer, name)
        further = read_table(further_path)
        values = _columns(further, further_path)[name]
        metadata = further.schema.metadata
        columns[name] = values.reshape(len(values), *json.loads(metadata[b"shape"]))
        over_domains[name] = cast(OverDomains, metadata.get(b"over_domains", b"sum").decode())
    num_tokens = table["num_tokens"][0].as_py()
    return LayerEvidence(
        layer=table["layer"][0].as_py(),
        num_tokens=num_tokens,
        num_output_tokens=table["num_output_tokens"][0].as_py() if is_sampled else num_tokens,
        num_experts=len(table),
        columns=columns,
        groups=read_groups(groups_file(calibrate_dir, layer)) if is_sampled else None,
        over_domains=over_domains,
    )
