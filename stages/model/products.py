"""Efficient matrix products of experts, by device and module.

`grouped_down` has not been run on a GPU. Tests run it on a CPU, with the same results (tests/stages/test_products.py).

Dimensions: D hidden size, F intermediate size, E experts, R routed pairs of a token and an expert, sorted by expert.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.moe import _default_apply_gate

from stages.model.expert_weights import ExpertWeights, is_llama4

_GROUPED_ALIGNMENT = 16
"""Required alignment in bytes of the rows of both operands."""
_LEAST_STEP = 64
_STEPS_PER_DOUBLING = 8


def padded(num_rows: int, device: torch.device) -> int:
    """Number of rows to which a product of num_rows rows is padded. Only on a CPU is it larger than num_rows.

    oneDNN compiles and caches a kernel for every new number of rows, and the number of tokens routed to an expert is new almost
    every time. Rounding it up to a multiple of 64, and above 1,024 by at most an eighth, leaves few different numbers. The
    steps are fixed, because the bits of a row may depend on the number of rows.
    """
    if device.type != "cpu":
        return num_rows
    step = max(_LEAST_STEP, (1 << num_rows.bit_length() - 1) // _STEPS_PER_DOUBLING) if num_rows else _LEAST_STEP
    return -(-num_rows // step) * step


def room_for(bounds: Sequence[int], device: torch.device) -> int:
    """Rows of a buffer in which each expert's product may be padded. bounds: first row of each expert, and the end."""
    return max(low + padded(high - low, device) for low, high in pairwise(bounds))


def gates_by_halves(experts: Any) -> bool:
    """Whether a module computes its gate as most do: act(first half) * second half. Llama 4 does, but has no method for it.

    Not to be called for a module without a gate.
    """
    return is_llama4(experts) or getattr(type(experts), "_apply_gate", None) is _default_apply_gate


def gate_order(experts: Any) -> str:
    """Order of the columns of gate and up: "halves" if all gate columns come first, "interleaved" if they alternate.

    Modules with their own activation use either order. It is found by trial: by the neuron whose value the second column
    changes.
    """
    if gates_by_halves(experts):
        return "halves"
    columns = torch.full((1, 4), 0.5)
    other = columns.clone()
    other[0, 1] = 0.25
    (changed,) = (experts._apply_gate(columns) != experts._apply_gate(other))[0].nonzero().flatten().tolist()
    return "interleaved" if changed == 0 else "halves"


def can_group(weights: ExpertWeights) -> bool:
    """Whether all experts' products with W_down should be one call: on a GPU, if its kernel supports the dtype and shapes.

    A CPU gains nothing, because the call is a loop over experts there.
    """
    sizes = (weights.hidden_size, weights.intermediate)
    are_aligned = all(size * weights.dtype.itemsize % _GROUPED_ALIGNMENT == 0 for size in sizes)
    return weights.device.type == "cuda" and weights.dtype == torch.bfloat16 and are_aligned and weights.is_loaded("down_proj")


def grouped_down(weights: ExpertWeights, rows_RF: Tensor, bounds: Sequence[int], first: int) -> Tensor:
    """Outputs [R, D] of experts from `first` on, biases added. bounds: first row of each expert, and the end."""
    stop = first + len(bounds) - 1
    down = weights.experts.down_proj[first:stop]
    ends = torch.tensor(bounds[1:], dtype=torch.int32, device=rows_RF.device)
    output_RD = functional.grouped_mm(rows_RF, down if weights.layout.is_transposed else down.mT, offs=ends)
    if weights.layout.has_bias:
        for bias_D, (low, high) in zip(weights.experts.down_proj_bias[first:stop], pairwise(bounds), strict=True):
            output_RD[low:high] += bias_D
    return output_RD
