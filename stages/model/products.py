"""How an expert's products are best made, by device and module.

No GPU has run `grouped_down`; a CPU does, in tests, to the same results (tests/stages/test_products.py).

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
"""Bytes that rows of both operands must be a multiple of."""
_LEAST_STEP = 64
_STEPS_PER_DOUBLING = 8


def padded(num_rows: int, device: torch.device) -> int:
    """Rows that a product of num_rows rows runs over: on a CPU more, so that few different numbers occur.

    oneDNN makes a kernel for every new number of rows, and keeps it; how many tokens are routed to an expert is a new number
    almost every time. Few numbers are left when they are rounded up to a multiple of 64 and, above 1,024, by at most an eighth.
    The bits of a row may depend on how many rows there are, so the steps are fixed.
    """
    if device.type != "cpu":
        return num_rows
    step = max(_LEAST_STEP, (1 << num_rows.bit_length() - 1) // _STEPS_PER_DOUBLING) if num_rows else _LEAST_STEP
    return -(-num_rows // step) * step


def room_for(bounds: Sequence[int], device: torch.device) -> int:
    """Rows of a buffer in which each expert's product may be padded. bounds: where each one's rows begin, and the end."""
    return max(low + padded(high - low, device) for low, high in pairwise(bounds))


def gates_by_halves(experts: Any) -> bool:
    """Whether a module gates as most do: act(first half) * second half. Llama 4's has no method for it, and does the same.

    Nor has a module without a gate, which is not asked.
    """
    return is_llama4(experts) or getattr(type(experts), "_apply_gate", None) is _default_apply_gate


def gate_order(experts: Any) -> str:
    """How a module with a gate keeps what it multiplies: "halves" where all gates come first, "interleaved" for pairs.

    Found by trial, since modules with an activation of their own do either: which neuron does the second column belong to?
    """
    if gates_by_halves(experts):
        return "halves"
    columns = torch.full((1, 4), 0.5)
    other = columns.clone()
    other[0, 1] = 0.25
    (changed,) = (experts._apply_gate(columns) != experts._apply_gate(other))[0].nonzero().flatten().tolist()
    return "interleaved" if changed == 0 else "halves"


def can_group(weights: ExpertWeights) -> bool:
    """Whether all experts' products with W_down are to be one call: on a GPU, in the dtype and shapes that its kernel takes.

    A CPU gains nothing by it: there the call is a loop over experts.
    """
    sizes = (weights.hidden_size, weights.intermediate)
    are_aligned = all(size * weights.dtype.itemsize % _GROUPED_ALIGNMENT == 0 for size in sizes)
    return weights.device.type == "cuda" and weights.dtype == torch.bfloat16 and are_aligned


def grouped_down(weights: ExpertWeights, rows_RF: Tensor, bounds: Sequence[int], first: int) -> Tensor:
    """Outputs [R, D] of experts from `first` on, biases added. bounds: where each expert's rows begin, and the end."""
    stop = first + len(bounds) - 1
    down = weights.experts.down_proj[first:stop]
    ends = torch.tensor(bounds[1:], dtype=torch.int32, device=rows_RF.device)
    output_RD = functional.grouped_mm(rows_RF, down if weights.layout.is_transposed else down.mT, offs=ends)
    if weights.layout.has_bias:
        for bias_D, (low, high) in zip(weights.experts.down_proj_bias[first:stop], pairwise(bounds), strict=True):
            output_RD[low:high] += bias_D
    return output_RD
