"""The sums of one layer over one token shard, before W_down. Deleted once they have been added up.

Dimensions: F intermediate size, E experts, G groups of sequences.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, list_column, read_lists, read_table, write_table
from stages.io.files import WrittenFile


@dataclass(frozen=True)
class PartialStatistics:
    """The sums. activation_sum_EGF takes the place of output sums, by group of sequences; num_sampled_G: the tokens that it
    runs over. Without sampling there is one group, of all tokens."""

    layer: int
    num_tokens: int
    num_sampled_G: Array
    num_routed_E: Array
    gate_sum_E: Array
    activation_sum_EGF: Array
    gated_output_norm_sum_E: Array
    router_probability_sum_E: Array
    router_logit_gram_EE: Array


def _schema(part: PartialStatistics) -> pa.Schema:
    num_experts, num_groups, intermediate = part.activation_sum_EGF.shape
    return pa.schema(
        [
            pa.field("layer", pa.int32(), False),
            pa.field("num_tokens", pa.int64(), False),
            pa.field("num_routed_tokens", pa.int64(), False),
            pa.field("gate_sum", pa.float64(), False),
            pa.field("num_sampled_tokens", pa.list_(pa.int64(), num_groups), False),
            pa.field("activation_sum", pa.list_(pa.float64(), num_groups * intermediate), False),
            pa.field("gated_output_norm_sum", pa.float64(), False),
            pa.field("router_probability_sum", pa.float64(), False),
            pa.field("router_logit_gram", pa.list_(pa.float64(), num_experts), False),
        ],
        metadata={
            "table": "statistics of one MoE layer over one token shard, one expert a row",
            "num_sampled_tokens": "[G] tokens of each group of sequences that activation_sum runs over",
            "activation_sum": "[G F] sum over those of what W_down is applied to, act(W_gate x) * W_up x",
        },
    )


def write_partial_statistics(path: Path, part: PartialStatistics) -> WrittenFile:
    """Write the sums of one layer over one token shard."""
    num_experts = len(part.num_routed_E)
    columns = {
        "layer": np.full(num_experts, part.layer, dtype=np.int32),
        "num_tokens": np.full(num_experts, part.num_tokens, dtype=np.int64),
        "num_routed_tokens": part.num_routed_E,
        "gate_sum": part.gate_sum_E,
        "num_sampled_tokens": list_column(np.tile(part.num_sampled_G, (num_experts, 1)), pa.int64()),
        "activation_sum": list_column(part.activation_sum_EGF.reshape(num_experts, -1), pa.float64()),
        "gated_output_norm_sum": part.gated_output_norm_sum_E,
        "router_probability_sum": part.router_probability_sum_E,
        "router_logit_gram": list_column(part.router_logit_gram_EE, pa.float64()),
    }
    return write_table(path, columns, _schema(part))


def read_partial_statistics(path: Path) -> PartialStatistics:
    """Read the sums of one layer over one token shard."""
    table = read_table(path)
    num_sampled_G = read_lists(table, "num_sampled_tokens")[0]
    return PartialStatistics(
        layer=table["layer"][0].as_py(),
        num_tokens=table["num_tokens"][0].as_py(),
        num_sampled_G=num_sampled_G,
        num_routed_E=table["num_routed_tokens"].to_numpy(),
        gate_sum_E=table["gate_sum"].to_numpy(),
        activation_sum_EGF=read_lists(table, "activation_sum").reshape(len(table), len(num_sampled_G), -1),
        gated_output_norm_sum_E=table["gated_output_norm_sum"].to_numpy(),
        router_probability_sum_E=table["router_probability_sum"].to_numpy(),
        router_logit_gram_EE=read_lists(table, "router_logit_gram"),
    )
