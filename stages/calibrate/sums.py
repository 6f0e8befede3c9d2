"""Sums of one layer: their transient file per token shard, their addition, and the evidence computed from them.

Dimensions: D hidden size, F intermediate size, E experts, C cells, N rows of a block of W_down.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from stages.calibrate.collectors.base import Collector
from stages.calibrate.collectors.output_sum import BY_CELL
from stages.calibrate.weight_products import WeightProducts
from stages.contracts.arrow import Array, list_column, read_lists, read_table, write_table
from stages.contracts.errors import InputError
from stages.contracts.evidence import Column, LayerEvidence, OutputGroups
from stages.io.files import WrittenFile

_ROWS = 256
"""Rows of W_down converted to float64 at a time, in a reused buffer. One whole expert of Mixtral-8x7B would take 470 MB."""
_FINITE = ("output_sum", "router_logit_gram")
"""Columns in which a NaN identifies the expert with bad weights. In other columns one bad expert may affect all experts."""


@dataclass(frozen=True)
class PartialSums:
    """Sums by name of the collector, then by name of the sum. Their first axis is the experts. A collector without sums may be
    left out.

    num_tokens: all tokens. num_unrouted_C: tokens of each cell that the un-routed sums cover.
    """

    layer: int
    num_tokens: int
    num_unrouted_C: Array
    sums: Mapping[str, Mapping[str, Array]]


def write_partial_sums(path: Path, part: PartialSums) -> WrittenFile:
    """Write the sums of one layer over one token shard, one row per expert."""
    arrays = {f"{name}.{key}": values for name, sums in part.sums.items() for key, values in sums.items()}
    num_experts = len(next(iter(arrays.values())))
    flat = {name: values.reshape(num_experts, -1) for name, values in arrays.items() if values.size}  # Arrow has no empty lists
    columns = {
        "num_unrouted_tokens": list_column(np.tile(part.num_unrouted_C, (num_experts, 1)), pa.int64()),
        **{name: list_column(values, pa.from_numpy_dtype(values.dtype)) for name, values in flat.items() if values.size},
    }
    metadata = {
        "table": "sums of one MoE layer over one token shard, one expert a row; columns are named collector.sum",
        "layer": str(part.layer),
        "num_tokens": str(part.num_tokens),
        "num_unrouted_tokens": "[C] tokens of each cell that sums over un-routed experts run over",
        "shapes": json.dumps({name: values.shape[1:] for name, values in arrays.items()}),
    }
    schema = pa.schema([pa.field(name, column.type, False) for name, column in columns.items()], metadata=metadata)
    return write_table(path, columns, schema)


def read_partial_sums(path: Path) -> PartialSums:
    """Read the sums of one layer over one token shard."""
    table = read_table(path)
    metadata = table.schema.metadata
    sums: dict[str, dict[str, Array]] = {}
    for column, shape in json.loads(metadata[b"shapes"]).items():
        collector, _, name = column.partition(".")
        is_kept = column in table.column_names
        values = read_lists(table, column).reshape(len(table), *shape) if is_kept else np.zeros((len(table), *shape))
        sums.setdefault(collector, {})[name] = values
    num_unrouted_C = read_lists(table, "num_unrouted_tokens")[0]
    return PartialSums(int(metadata[b"layer"]), int(metadata[b"num_tokens"]), num_unrouted_C, sums)


def add_up(parts: Iterable[PartialSums], collectors: Sequence[Collector]) -> PartialSums:
    """Add sums over token shards in the order given, because float64 addition is not associative. One is held at a time."""

    def two(one: PartialSums, other: PartialSums) -> PartialSums:
        assert other.layer == one.layer
        return replace(
            one,
            num_tokens=one.num_tokens + other.num_tokens,
            num_unrouted_C=one.num_unrouted_C + other.num_unrouted_C,
            sums={
                collector.name: collector.add(one.sums.get(collector.name, {}), other.sums.get(collector.name, {}))
                for collector in collectors
            },
        )

    return reduce(two, parts)


@dataclass(frozen=True)
class LayerSums:
    """Data that a collector may use to finish its columns. Implements the protocol `Summed`."""

    num_tokens: int
    num_unrouted_C: Array
    products: WeightProducts

    def through_w_down(self, activation_sum_ECF: Array) -> Array:
        """W_down, and its bias once per token, applied to summed activations: float64 [E, C, D].

        The result is computed once per layer: converting W_down to float64 costs about as much memory traffic as the forward of
        a short token shard.
        """
        weights = self.products.weights
        num_unrouted_C1 = torch.tensor(self.num_unrouted_C, device=weights.device)[:, None]
        sum_ECF = torch.tensor(activation_sum_ECF, device=weights.device)
        num_experts, num_cells, intermediate = sum_ECF.shape
        output_sum_ECD = sum_ECF.new_empty(num_experts, num_cells, weights.hidden_size)
        block_NF = sum_ECF.new_empty(min(_ROWS, weights.hidden_size), intermediate)
        for expert, output_CD in enumerate(output_sum_ECD):
            for first, weight_FD in weights.matrices("down_proj", expert, expert + 1):
                some_CD = output_CD[:, first : first + weight_FD.shape[1]]
                for out_CN, some_NF in zip(some_CD.split(_ROWS, dim=1), weight_FD.T.split(_ROWS), strict=True):
                    out_CN.copy_(sum_ECF[expert] @ block_NF[: len(some_NF)].copy_(some_NF).T)
            weights.release("down_proj", expert, expert + 1)
            bias_D = weights.bias("down_proj", expert, expert + 1)
            if bias_D is not None:
                output_CD += num_unrouted_C1 * bias_D.double()
        return output_sum_ECD.cpu().numpy()

    def down_square_norms(self) -> Array:
        """Squared norms of the columns of W_down, float64 [E, F]: for each neuron."""
        return self.products.down_square_norms

    def weight_gram(self) -> Array:
        """Inner products of all weights and biases of the experts, float64 [E, E]."""
        return self.products.gram


def evidence_of(
    total: PartialSums, collectors: Sequence[Collector], products: WeightProducts, is_sampled: bool
) -> LayerEvidence:
    """Compute the evidence of a layer from its sums. products: of the layer's weights; those that were computed for one domain
    serve the next.
    Raises InputError, naming layer and expert, for a value that is not finite."""
    summed, weights = LayerSums(total.num_tokens, total.num_unrouted_C, products), products.weights
    columns: dict[str, Array] = {}
    for collector in collectors:
        found = dict(collector.finish(total.sums.get(collector.name, {}), summed))
        columns |= found | {column.name: _typed(column, found[column.name]) for column in collector.columns}
    _check_finite(total.layer, columns, weights.dtype)
    output_sum_ECD = columns.pop(BY_CELL)
    return LayerEvidence(
        layer=total.layer,
        num_tokens=total.num_tokens,
        num_output_tokens=int(total.num_unrouted_C.sum()),
        num_experts=weights.num_experts,
        columns=columns,
        groups=OutputGroups(total.num_unrouted_C, output_sum_ECD) if is_sampled else None,
    )


def _typed(column: Column, values: Array) -> Array:
    return values.astype(column.dtype, copy=False)


def _check_finite(layer: int, columns: Mapping[str, Array], dtype: torch.dtype) -> None:
    """Raise InputError if a column is not finite. dtype: dtype of the weights, for the message."""
    for expert in range(len(columns["output_sum"])):
        if not all(np.isfinite(columns[name][expert]).all() for name in _FINITE):
            raise InputError(
                f"layer {layer}: the outputs or router logits of expert {expert} on the calibration set are not "
                f"finite; its weights hold NaN or infinity, or overflow {dtype}; download the checkpoint again, or compute "
                f"in a dtype that holds them"
            )
