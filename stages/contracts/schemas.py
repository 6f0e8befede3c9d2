"""Every Arrow file of a run directory: its columns, and the metadata that explains them to a stranger.

Dimensions: S sequences, T tokens, D hidden size, E experts, K clusters.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from stages.contracts.errors import InputError
from stages.io.files import WrittenFile, write_file
from stages.io.storage import is_remote

VERSION = "2"

TENSORS = pa.schema(
    [
        pa.field("name", pa.string(), False),
        pa.field("file", pa.string(), False),
        pa.field("dtype", pa.string(), False),
        pa.field("shape", pa.list_(pa.int64()), False),
        pa.field("num_bytes", pa.int64(), False),
        pa.field("parameter", pa.string(), False),
        pa.field("layer", pa.int32()),
        pa.field("role", pa.string(), False),
        pa.field("expert", pa.int32()),
        pa.field("expert_axis", pa.int32()),
        pa.field("template", pa.string()),
        pa.field("scheme", pa.string(), False),
    ],
    metadata={
        "table": "tensors of a checkpoint, in the order of their bytes",
        "parameter": "name of the transformers parameter that this tensor becomes part of",
        "layer": "decoder layer, null outside of the layers",
        "role": "copy | expert (one expert's) | fused_expert (all experts') | router (rows by expert) | mtp (further tokens)",
        "expert": "index of the expert for role expert",
        "expert_axis": "axis of the experts for roles fused_expert and router",
        "template": "for role expert: the name with {} in place of the expert's index",
        "scheme": "fp8 | mxfp4 for a tensor quantised on disk, whose dtype, shape and num_bytes are those of its values",
    },
)

TOKENS = pa.schema(
    [pa.field("token_ids", pa.list_(pa.int32()), False)],
    metadata={"table": "one sequence a row", "token_ids": "[T] ids of the model's vocabulary"},
)

LOSSES = pa.schema(
    [
        pa.field("negative_log_likelihood", pa.float64(), False),
        pa.field("num_predictions", pa.int64(), False),
    ],
    metadata={"table": "one sequence a row", "negative_log_likelihood": "nats, summed over the sequence's predictions"},
)

DENDROGRAM = pa.schema(
    [
        pa.field("left", pa.int32(), False),
        pa.field("right", pa.int32(), False),
        pa.field("distance", pa.float64(), False),
        pa.field("num_experts", pa.int32(), False),
    ],
    metadata={
        "table": "one merge a row, in order (scipy.cluster.hierarchy.linkage)",
        "left, right": "an expert (< E), or E + i for the cluster made in row i",
        "distance": "distance of the two in the units of the feature",
        "num_experts": "experts in the new cluster",
    },
)

LABELS = pa.schema(
    [
        pa.field("num_clusters", pa.int32(), False),
        pa.field("expert", pa.int32(), False),
        pa.field("label", pa.int32(), False),
    ],
    metadata={
        "table": "for every K from 1 to E, the cluster of every expert",
        "label": "0 .. K-1, clusters numbered by their smallest member",
    },
)


ERRORS = pa.schema(
    [pa.field("expert", pa.int32(), False), pa.field("relative_standard_error", pa.float64(), False)],
    metadata={
        "table": "one expert a row",
        "relative_standard_error": "standard error of the expert's mean output over the norm of that mean; no unit",
    },
)

STABILITY = pa.schema(
    [
        pa.field("num_clusters", pa.int32(), False),
        pa.field("equal_share", pa.float64(), False),
        pa.field("mean_adjusted_rand_index", pa.float64(), False),
    ],
    metadata={
        "table": "for every K from 1 to E, the clusterings of random halves of the groups against that of all",
        "equal_share": "share of halves whose labels are those of all groups",
        "mean_adjusted_rand_index": "1 for equal clusterings, 0 on average for unrelated ones",
    },
)


def groups_schema(hidden_size: int) -> pa.Schema:
    """Sums of outputs by group of sequences, all experts of group 0 first."""
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


_LEADING = [
    pa.field("layer", pa.int32(), False),
    pa.field("expert", pa.int32(), False),
    pa.field("num_tokens", pa.int64(), False),
    pa.field("num_routed_tokens", pa.int64(), False),
    pa.field("gate_sum", pa.float64(), False),
]
_MEANINGS = {
    "dtype": "float64 sums, int64 counts",
    "units": "the model's own: outputs as the MoE block adds them up, logits as the router gives them",
    "num_tokens": "calibration tokens, T",
    "num_routed_tokens": "tokens whose top-k holds the expert, f_e",
    "gate_sum": "sum over routed tokens of the weight that the model gave the expert",
    "gated_output_norm_sum": "sum over routed tokens of gate * ||E_e(x)||_2",
    "router_probability_sum": "sum over all T tokens of the router's score (softmax or sigmoid of the logits)",
    "router_logit_gram": "[E] row e of sum over T of logit_e * logit_e'",
}


def _trailing(num_experts: int) -> list[pa.Field]:
    return [
        pa.field("gated_output_norm_sum", pa.float64(), False),
        pa.field("router_probability_sum", pa.float64(), False),
        pa.field("router_logit_gram", pa.list_(pa.float64(), num_experts), False),
    ]


def statistics_schema(layer: int, hidden_size: int, num_experts: int, is_sampled: bool) -> pa.Schema:
    """Statistics of one layer, a row an expert; all sums run over the calibration tokens and add up over shards."""
    sampled = [pa.field("num_output_tokens", pa.int64(), False)] if is_sampled else []
    meanings = {"num_output_tokens": "the tokens that output_sum runs over, a sample of T"} if is_sampled else {}
    return pa.schema(
        [*_LEADING, *sampled, pa.field("output_sum", pa.list_(pa.float64(), hidden_size), False), *_trailing(num_experts)],
        metadata={
            "table": "statistics of one MoE layer, one expert a row",
            "layer": str(layer),
            "num_experts": str(num_experts),
            "hidden_size": str(hidden_size),
            "shapes": f"output_sum [{hidden_size}], router_logit_gram [{num_experts}], all else a scalar",
            **_MEANINGS,
            **meanings,
            "output_sum": "[D] sum over tokens of E_e(x), not gated; x is the input of the MoE block"
            if is_sampled
            else "[D] sum over all T tokens of E_e(x), not gated; x is the input of the MoE block",
        },
    )


def partial_statistics_schema(layer: int, intermediate: int, num_groups: int, num_experts: int) -> pa.Schema:
    """The same over one token shard, before W_down."""
    return pa.schema(
        [
            *_LEADING,
            pa.field("num_sampled_tokens", pa.list_(pa.int64(), num_groups), False),
            pa.field("activation_sum", pa.list_(pa.float64(), num_groups * intermediate), False),
            *_trailing(num_experts),
        ],
        metadata={
            "table": "statistics of one MoE layer over one token shard, one expert a row",
            "layer": str(layer),
            "num_experts": str(num_experts),
            **_MEANINGS,
            "num_sampled_tokens": "[G] tokens of each group of sequences that activation_sum runs over",
            "activation_sum": "[G F] sum over those of what W_down is applied to, act(W_gate x) * W_up x",
        },
    )


def write_table(path: Path, columns: dict[str, Any], schema: pa.Schema) -> WrittenFile:
    """Write one Arrow file (IPC file format) with the schema's version in its metadata."""
    versioned = schema.with_metadata({**(schema.metadata or {}), b"version": VERSION.encode()})
    table = pa.table(columns, schema=versioned)

    def write(out: Any) -> None:
        with pa.ipc.new_file(pa.PythonFile(out, mode="w"), versioned) as writer:
            writer.write_table(table)

    return write_file(path, write)


def read_table(path: Path) -> pa.Table:
    """Read an Arrow file of this version. Raises InputError for a file that another version wrote, or that is damaged."""
    try:
        if is_remote(path):
            table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
        else:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid as e:
        raise InputError(f"{path} is not a readable Arrow file ({e}); delete it and run again") from e
    version = (table.schema.metadata or {}).get(b"version", b"").decode()
    if version != VERSION:
        raise InputError(f"{path} has version {version!r}, this program reads {VERSION!r}; use a new run_dir")
    return table


def list_column(values: Any, value_type: pa.DataType) -> pa.Array:
    """A 2-D array [rows, n] as a column of fixed-size lists of n values."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type=value_type), values.shape[1])
