"""Sums over tokens for every expert of one MoE layer, taken while the layer runs.

Dimensions: T tokens, D hidden size, F intermediate size, E experts, k experts a token.

One pass serves both purposes: a_e = act(W_gate x) * W_up x is computed for every expert on every token; W_down meets the
routed tokens (for the layer's output) and the sum of a_e (for the mean output), since
sum_t W_down a_t = W_down sum_t a_t. Features and notation follow HC-SMoE (arXiv:2410.08589, section 3).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from stages.common.errors import InputError
from stages.common.tables import Statistics

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
}


class LayerStatistics:
    """Watches one MoE layer's router and experts and adds up; the layer's output stays what it was, up to rounding.

    experts: the module with the fused weights and transformers' layout flags (`is_transposed`, `has_bias`, `has_gate`).
    router: the module that returns the router logits [T, E] first.
    score: how the family turns logits to probabilities, a key of SCORES.
    """

    def __init__(self, layer: int, experts: Any, router: nn.Module, score: str) -> None:
        self.layer, self.experts, self.router = layer, experts, router
        self.score = SCORES[score]
        num_experts, device = experts.num_experts, experts.down_proj.device
        intermediate = experts.down_proj.shape[1] if experts.is_transposed else experts.down_proj.shape[2]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.num_tokens = 0
        self.num_routed_E = zeros(num_experts)
        self.gate_sum_E = zeros(num_experts)
        self.activation_sum_EF = zeros(num_experts, intermediate)
        self.gated_output_norm_sum_E = zeros(num_experts)
        self.router_probability_sum_E = zeros(num_experts)
        self.router_logit_gram_EE = zeros(num_experts, num_experts)
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> "LayerStatistics":
        self.experts.forward = self._forward_experts
        self._hook = self.router.register_forward_hook(self._watch_router)
        return self

    def __exit__(self, *_: object) -> None:
        del self.experts.forward
        assert self._hook is not None
        self._hook.remove()

    def _watch_router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        logits_TE = (output[0] if isinstance(output, tuple) else output).reshape(-1, self.experts.num_experts).float()
        self.router_probability_sum_E += self.score(logits_TE).double().sum(0)
        self.router_logit_gram_EE += logits_TE.double().T @ logits_TE.double()

    def _linear(self, x: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self.experts, name)[expert]
        bias = getattr(self.experts, f"{name}_bias")[expert] if self.experts.has_bias else None
        return functional.linear(x, weight.T if self.experts.is_transposed else weight, bias)

    def _activation(self, x: Tensor, expert: int) -> Tensor:
        if self.experts.has_gate:
            return self.experts._apply_gate(self._linear(x, "gate_up_proj", expert))  # type: ignore[no-any-return]
        return self.experts.act_fn(self._linear(x, "up_proj", expert))  # type: ignore[no-any-return]

    def _forward_experts(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        """The experts' forward, [T, D]; routing is what the model passes, accumulation is float32."""
        self.num_tokens += hidden_TD.shape[0]
        out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
        for expert in range(self.experts.num_experts):
            a_TF = self._activation(hidden_TD, expert)
            self.activation_sum_EF[expert] += a_TF.sum(0, dtype=torch.float32).double()
            tokens, places = torch.where(top_k_index_Tk == expert)
            if not len(tokens):
                continue
            gates = top_k_weights_Tk[tokens, places].float()
            output = self._linear(a_TF[tokens], "down_proj", expert).float()
            out_TD.index_add_(0, tokens, output * gates[:, None])
            self.num_routed_E[expert] += len(tokens)
            self.gate_sum_E[expert] += gates.double().sum()
            self.gated_output_norm_sum_E[expert] += (gates * output.norm(dim=-1)).double().sum()
        return out_TD.to(hidden_TD.dtype)

    def result(self) -> Statistics:
        """The sums so far. Raises InputError, naming layer and expert, when one is not finite."""
        outputs = []
        for expert in range(self.experts.num_experts):
            weight = self.experts.down_proj[expert].double()
            output = self.activation_sum_EF[expert] @ (weight if self.experts.is_transposed else weight.T)
            if self.experts.has_bias:
                output = output + self.num_tokens * self.experts.down_proj_bias[expert].double()
            outputs.append(output)
        output_sum_ED = torch.stack(outputs)
        for expert in range(self.experts.num_experts):
            if not (torch.isfinite(output_sum_ED[expert]).all() and torch.isfinite(self.router_logit_gram_EE[expert]).all()):
                raise InputError(
                    f"layer {self.layer}: the outputs or router logits of expert {expert} on the calibration set are not "
                    f"finite; its weights hold NaN or infinity, or overflow {self.experts.down_proj.dtype}"
                )
        return Statistics(
            layer=self.layer,
            num_tokens=self.num_tokens,
            num_routed_E=self.num_routed_E.long().cpu().numpy(),
            gate_sum_E=self.gate_sum_E.cpu().numpy(),
            output_sum_ED=output_sum_ED.cpu().numpy(),
            gated_output_norm_sum_E=self.gated_output_norm_sum_E.cpu().numpy(),
            router_probability_sum_E=self.router_probability_sum_E.cpu().numpy(),
            router_logit_gram_EE=self.router_logit_gram_EE.cpu().numpy(),
        )


def add(parts: list[Statistics]) -> Statistics:
    """Sum of statistics of token shards, in the order given (float64 addition is not associative)."""
    total = parts[0]
    for part in parts[1:]:
        assert part.layer == total.layer
        total = Statistics(
            layer=total.layer,
            num_tokens=total.num_tokens + part.num_tokens,
            num_routed_E=total.num_routed_E + part.num_routed_E,
            gate_sum_E=total.gate_sum_E + part.gate_sum_E,
            output_sum_ED=total.output_sum_ED + part.output_sum_ED,
            gated_output_norm_sum_E=total.gated_output_norm_sum_E + part.gated_output_norm_sum_E,
            router_probability_sum_E=total.router_probability_sum_E + part.router_probability_sum_E,
            router_logit_gram_EE=total.router_logit_gram_EE + part.router_logit_gram_EE,
        )
    return total
