"""Writers of the tables of calibrate."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages.contracts.schemas import groups_schema, list_column, partial_statistics_schema, statistics_schema, write_table
from stages.contracts.tables import Array, PartialStatistics, Statistics
from stages.io.files import WrittenFile


def _plain_columns(sums: Statistics | PartialStatistics) -> dict[str, Any]:
    num_experts = len(sums.num_routed_E)
    return {
        "layer": np.full(num_experts, sums.layer, dtype=np.int32),
        "expert": np.arange(num_experts, dtype=np.int32),
        "num_tokens": np.full(num_experts, sums.num_tokens, dtype=np.int64),
        "num_routed_tokens": sums.num_routed_E,
        "gate_sum": sums.gate_sum_E,
        "gated_output_norm_sum": sums.gated_output_norm_sum_E,
        "router_probability_sum": sums.router_probability_sum_E,
    }


def write_statistics(path: Path, statistics: Statistics, is_sampled: bool) -> WrittenFile:
    """Write one layer's statistics."""
    num_experts, hidden_size = statistics.output_sum_ED.shape
    schema = statistics_schema(statistics.layer, hidden_size, num_experts, is_sampled)
    columns = _plain_columns(statistics)
    if is_sampled:
        columns["num_output_tokens"] = np.full(num_experts, statistics.num_output_tokens, dtype=np.int64)
    for name, values in {"output_sum": statistics.output_sum_ED, "router_logit_gram": statistics.router_logit_gram_EE}.items():
        columns[name] = list_column(values, schema.field(name).type.value_type)
    return write_table(path, {name: columns[name] for name in schema.names}, schema)


def write_groups(path: Path, num_sampled_G: Array, output_sum_EGD: Array) -> WrittenFile:
    """Write one layer's output sums by group of sequences."""
    num_experts, num_groups, hidden_size = output_sum_EGD.shape
    sums = np.ascontiguousarray(output_sum_EGD.transpose(1, 0, 2)).reshape(-1, hidden_size)
    columns = {
        "group": np.repeat(np.arange(num_groups, dtype=np.int32), num_experts),
        "expert": np.tile(np.arange(num_experts, dtype=np.int32), num_groups),
        "num_sampled_tokens": np.repeat(num_sampled_G, num_experts),
        "output_sum": list_column(sums, pa.float64()),
    }
    return write_table(path, columns, groups_schema(hidden_size))


def write_partial_statistics(path: Path, part: PartialStatistics) -> WrittenFile:
    """Write one layer's statistics over one token shard."""
    num_experts, num_groups, intermediate = part.activation_sum_EGF.shape
    schema = partial_statistics_schema(part.layer, intermediate, num_groups, num_experts)
    columns = _plain_columns(part)
    matrices = {
        "num_sampled_tokens": np.tile(part.num_sampled_G, (num_experts, 1)),
        "activation_sum": part.activation_sum_EGF,
        "router_logit_gram": part.router_logit_gram_EE,
    }
    for name, values in matrices.items():
        columns[name] = list_column(values.reshape(num_experts, -1), schema.field(name).type.value_type)
    return write_table(path, {name: columns[name] for name in schema.names}, schema)
