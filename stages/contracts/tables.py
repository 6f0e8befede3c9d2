"""Readers of the tables through which stages meet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from stages.contracts.errors import InputError
from stages.contracts.schemas import read_table

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Statistics:
    """Statistics of one layer as arrays; meanings and units stand in `schemas.statistics_schema`.

    num_tokens: int; num_output_tokens: of them, those that output_sum_ED runs over; num_routed_E, gate_sum_E,
    gated_output_norm_sum_E, router_probability_sum_E; output_sum_ED; router_logit_gram_EE. Sums are float64, counts int64.
    """

    layer: int
    num_tokens: int
    num_output_tokens: int
    num_routed_E: Array
    gate_sum_E: Array
    output_sum_ED: Array
    gated_output_norm_sum_E: Array
    router_probability_sum_E: Array
    router_logit_gram_EE: Array


@dataclass(frozen=True)
class PartialStatistics:
    """The same over one token shard, before W_down: activation_sum_EGF instead of output sums, for each of G groups of
    sequences; num_sampled_G: the tokens that it runs over. Without sampling there is one group, of all tokens."""

    layer: int
    num_tokens: int
    num_sampled_G: Array
    num_routed_E: Array
    gate_sum_E: Array
    activation_sum_EGF: Array
    gated_output_norm_sum_E: Array
    router_probability_sum_E: Array
    router_logit_gram_EE: Array


def token_ids(path: Path) -> Tensor:
    """Token ids int64 [S, T] of a token shard."""
    return torch.tensor(read_table(path)["token_ids"].to_pylist(), dtype=torch.int64)


def _matrix(table: pa.Table, name: str) -> Array:
    column = table[name].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)  # type: ignore[no-any-return]


def _plain_sums(table: pa.Table) -> dict[str, Any]:
    """What statistics and partial statistics have in common."""
    return {
        "layer": table["layer"][0].as_py(),
        "num_tokens": table["num_tokens"][0].as_py(),
        "num_routed_E": table["num_routed_tokens"].to_numpy(),
        "gate_sum_E": table["gate_sum"].to_numpy(),
        "gated_output_norm_sum_E": table["gated_output_norm_sum"].to_numpy(),
        "router_probability_sum_E": table["router_probability_sum"].to_numpy(),
        "router_logit_gram_EE": _matrix(table, "router_logit_gram"),
    }


def statistics(path: Path) -> Statistics:
    """Read one layer's statistics."""
    table = read_table(path)
    sums = _plain_sums(table)
    is_sampled = "num_output_tokens" in table.column_names
    num_output_tokens = table["num_output_tokens"][0].as_py() if is_sampled else sums["num_tokens"]
    found = Statistics(**sums, num_output_tokens=num_output_tokens, output_sum_ED=_matrix(table, "output_sum"))
    for name, column in vars(found).items():
        if isinstance(column, np.ndarray) and not np.isfinite(column).all():
            expert = int(np.argwhere(~np.isfinite(column))[0, 0])
            raise InputError(f"{path}: {name} of expert {expert} is not finite; delete the file and calibrate again")
    return found


def partial_statistics(path: Path) -> PartialStatistics:
    """Read the statistics of one layer over one token shard."""
    table = read_table(path)
    num_sampled_G = _matrix(table, "num_sampled_tokens")[0]
    activation_sum_EGF = _matrix(table, "activation_sum").reshape(len(table), len(num_sampled_G), -1)
    return PartialStatistics(**_plain_sums(table), num_sampled_G=num_sampled_G, activation_sum_EGF=activation_sum_EGF)


def output_groups(path: Path) -> tuple[Array, Array]:
    """Sampled tokens int64 [G] and output sums float64 [E, G, D] of one layer's groups of sequences."""
    table = read_table(path)
    num_groups = table["group"][-1].as_py() + 1
    num_sampled_G = table["num_sampled_tokens"].to_numpy().reshape(num_groups, -1)[:, 0]
    output_sum_GED = _matrix(table, "output_sum").reshape(num_groups, -1, table.schema.field("output_sum").type.list_size)
    return num_sampled_G, output_sum_GED.transpose(1, 0, 2)


def labels(path: Path, num_clusters: int) -> Array:
    """Cluster label int [E] of every expert for a cut to num_clusters."""
    table = read_table(path)
    rows = table["num_clusters"].to_numpy() == num_clusters
    return table["label"].to_numpy()[rows]  # type: ignore[no-any-return]
