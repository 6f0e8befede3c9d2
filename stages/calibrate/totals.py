"""The statistics of a layer from those of its token shards.

Dimensions: D hidden size, F intermediate size, E experts, G groups of sequences.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.calibrate.statistics import ExpertsLayout
from stages.common.errors import InputError
from stages.common.tables import Array, PartialStatistics, Statistics


def add(parts: Sequence[PartialStatistics]) -> PartialStatistics:
    """Sum over token shards, in the order given (float64 addition is not associative)."""
    total = parts[0]
    for part in parts[1:]:
        assert part.layer == total.layer
        sums = {name: value + getattr(part, name) for name, value in vars(total).items() if name != "layer"}
        total = PartialStatistics(layer=total.layer, **sums)
    return total


def outputs(total: PartialStatistics, experts: Any) -> Array:
    """Sums of outputs, float64 [E, G, D]: W_down, and its bias for every token, applied to the summed activations.

    experts: the layer's module with the weights. Once a layer, since a float64 copy of W_down costs about as much memory
    traffic as the forward of a short token shard.
    """
    layout = ExpertsLayout.of(experts)
    device = experts.down_proj.device
    num_sampled_G1 = torch.tensor(total.num_sampled_G, device=device)[:, None]
    output_sum_EGD: list[Tensor] = []
    for expert, activation_sum_GF in enumerate(torch.tensor(total.activation_sum_EGF, device=device)):
        weight = experts.down_proj[expert].double()
        output_GD = activation_sum_GF @ (weight if layout.is_transposed else weight.T)
        if layout.has_bias:
            output_GD = output_GD + num_sampled_G1 * experts.down_proj_bias[expert].double()
        output_sum_EGD.append(output_GD)
    return torch.stack(output_sum_EGD).cpu().numpy()


def finish(total: PartialStatistics, output_sum_EGD: Array, dtype: torch.dtype) -> Statistics:
    """Statistics of a layer, its groups added up. Raises InputError, naming layer and expert, when a sum is not finite.

    dtype: of the weights, for the message.
    """
    output_sum_ED = output_sum_EGD.sum(1)
    for expert in range(len(output_sum_ED)):
        if not (np.isfinite(output_sum_ED[expert]).all() and np.isfinite(total.router_logit_gram_EE[expert]).all()):
            raise InputError(
                f"layer {total.layer}: the outputs or router logits of expert {expert} on the calibration set are not "
                f"finite; its weights hold NaN or infinity, or overflow {dtype}"
            )
    return Statistics(
        layer=total.layer,
        num_tokens=total.num_tokens,
        num_output_tokens=int(total.num_sampled_G.sum()),
        num_routed_E=total.num_routed_E,
        gate_sum_E=total.gate_sum_E,
        output_sum_ED=output_sum_ED,
        gated_output_norm_sum_E=total.gated_output_norm_sum_E,
        router_probability_sum_E=total.router_probability_sum_E,
        router_logit_gram_EE=total.router_logit_gram_EE,
    )
