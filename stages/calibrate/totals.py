"""The statistics of a layer from those of its token shards.

Dimensions: D hidden size, C some of them, F intermediate size, E experts, G groups of sequences.
"""

from collections.abc import Sequence

import numpy as np
import torch

from stages.calibrate.partial import PartialStatistics
from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.evidence import Column, LayerEvidence, OutputGroups
from stages.model.expert_weights import ExpertWeights

_ROWS = 256
"""Rows of W_down that are made float64 at a time, in one place: whole, one expert of Mixtral-8x7B would take 470 MB."""


COLUMNS = (
    Column("num_routed_tokens", "tokens whose top-k holds the expert, f_e", dtype="int64"),
    Column("gate_sum", "sum over routed tokens of the weight that the model gave the expert"),
    Column("gated_output_norm_sum", "sum over routed tokens of gate * ||E_e(x)||_2"),
    Column("router_probability_sum", "sum over all T tokens of the router's score (softmax or sigmoid of the logits)"),
    Column("router_logit_gram", "row e of sum over T of logit_e * logit_e'", "[E]"),
    Column("output_sum", "sum over {tokens} of E_e(x), not gated; x is the input of the MoE block", "[D]"),
)


def add(parts: Sequence[PartialStatistics]) -> PartialStatistics:
    """Sum over token shards, in the order given (float64 addition is not associative)."""
    total = parts[0]
    for part in parts[1:]:
        assert part.layer == total.layer
        sums = {name: value + getattr(part, name) for name, value in vars(total).items() if name != "layer"}
        total = PartialStatistics(layer=total.layer, **sums)
    return total


def outputs(total: PartialStatistics, weights: ExpertWeights) -> Array:
    """Sums of outputs, float64 [E, G, D]: W_down, and its bias for every token, applied to the summed activations.

    Once a layer, since making W_down float64 costs about as much memory traffic as the forward of a short token shard.
    """
    num_sampled_G1 = torch.tensor(total.num_sampled_G, device=weights.device)[:, None]
    activation_sum_EGF = torch.tensor(total.activation_sum_EGF, device=weights.device)
    num_experts, num_groups, intermediate = activation_sum_EGF.shape
    output_sum_EGD = activation_sum_EGF.new_empty(num_experts, num_groups, weights.hidden_size)
    block_CF = activation_sum_EGF.new_empty(min(_ROWS, weights.hidden_size), intermediate)
    for expert, output_GD in enumerate(output_sum_EGD):
        for first, weight_FD in weights.matrices("down_proj", expert, expert + 1):
            some_GD = output_GD[:, first : first + weight_FD.shape[1]]
            for out_GC, some_CF in zip(some_GD.split(_ROWS, dim=1), weight_FD.T.split(_ROWS), strict=True):
                out_GC.copy_(activation_sum_EGF[expert] @ block_CF[: len(some_CF)].copy_(some_CF).T)
        weights.release("down_proj", expert, expert + 1)
        bias_D = weights.bias("down_proj", expert, expert + 1)
        if bias_D is not None:
            output_GD += num_sampled_G1 * bias_D.double()
    return output_sum_EGD.cpu().numpy()


def finish(total: PartialStatistics, output_sum_EGD: Array, dtype: torch.dtype, is_sampled: bool) -> LayerEvidence:
    """Evidence of a layer; columns are totals over its groups.

    Raises InputError, naming layer and expert, when a sum is not finite.

    dtype: of the weights, for the message.
    """
    output_sum_ED = output_sum_EGD.sum(1)
    for expert in range(len(output_sum_ED)):
        if not (np.isfinite(output_sum_ED[expert]).all() and np.isfinite(total.router_logit_gram_EE[expert]).all()):
            raise InputError(
                f"layer {total.layer}: the outputs or router logits of expert {expert} on the calibration set are not "
                f"finite; its weights hold NaN or infinity, or overflow {dtype}"
            )
    columns = {
        "num_routed_tokens": total.num_routed_E,
        "gate_sum": total.gate_sum_E,
        "gated_output_norm_sum": total.gated_output_norm_sum_E,
        "router_probability_sum": total.router_probability_sum_E,
        "router_logit_gram": total.router_logit_gram_EE,
        "output_sum": output_sum_ED,
    }
    return LayerEvidence(
        layer=total.layer,
        num_tokens=total.num_tokens,
        num_output_tokens=int(total.num_sampled_G.sum()),
        num_experts=len(output_sum_ED),
        columns=columns,
        groups=OutputGroups(total.num_sampled_G, output_sum_EGD) if is_sampled else None,
    )
