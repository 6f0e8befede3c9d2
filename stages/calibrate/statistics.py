"""Sums over tokens for every expert of one MoE layer, taken while the layer runs.

Dimensions: T tokens, D hidden size, F intermediate size, E experts, k experts a token.

One pass serves both purposes: a_e = act(W_gate x) * W_up x is computed for every expert on every token; W_down meets the
routed tokens (for the layer's output) and the sum of a_e (for the mean output), since
sum_t W_down a_t = W_down sum_t a_t. Features and notation follow HC-SMoE (arXiv:2410.08589, section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from stages.common.tables import PartialStatistics

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_TE: logits_TE.softmax(-1),
    "sigmoid": lambda logits_TE: logits_TE.sigmoid(),
}


@dataclass(frozen=True)
class ExpertsLayout:
    """How an experts module keeps its weights: transformers' own flags where the module declares them."""

    is_transposed: bool
    has_bias: bool
    has_gate: bool

    @classmethod
    def of(cls, experts: Any) -> "ExpertsLayout":
        """Read the flags; Llama 4's module has none, and multiplies from the right."""
        if hasattr(experts, "is_transposed"):
            return cls(experts.is_transposed, experts.has_bias, experts.has_gate)
        return cls(is_transposed=True, has_bias=False, has_gate=True)


class LayerStatistics:
    """Watches one MoE layer's router and experts and adds up; the layer's output stays what it was, up to rounding.

    experts: the module with the fused weights and transformers' layout flags (`is_transposed`, `has_bias`, `has_gate`).
    router: the module that returns the router logits [T, E] first.
    score: how the family turns logits to probabilities, a key of SCORES.
    """

    def __init__(self, layer: int, experts: Any, router: nn.Module, score: str) -> None:
        self.layer, self.experts, self.router = layer, experts, router
        self.score = SCORES[score]
        self.layout = ExpertsLayout.of(experts)
        num_experts, device = experts.num_experts, experts.down_proj.device
        intermediate = experts.down_proj.shape[1] if self.layout.is_transposed else experts.down_proj.shape[2]

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
        self._forward: Callable[..., Tensor] = self._forward_routed

    def __enter__(self) -> Self:
        self.experts.forward = self._forward
        self._hook = self.router.register_forward_hook(self._watch_router)
        return self

    def __exit__(self, *_: object) -> None:
        del self.experts.forward
        assert self._hook is not None
        self._hook.remove()

    def _watch_router(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._add_logits(output[0] if isinstance(output, tuple) else output)

    def _add_logits(self, logits: Tensor) -> None:
        logits_TE = logits.reshape(-1, self.experts.num_experts).float()
        self.router_probability_sum_E += self.score(logits_TE).double().sum(0)
        self.router_logit_gram_EE += logits_TE.double().T @ logits_TE.double()

    def _linear(self, x: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self.experts, name)[expert]
        out = functional.linear(x, weight.T if self.layout.is_transposed else weight)
        return out + getattr(self.experts, f"{name}_bias")[expert] if self.layout.has_bias else out

    def _activation(self, x: Tensor, expert: int) -> Tensor:
        if self.layout.has_gate:
            return self._apply_gate(self._linear(x, "gate_up_proj", expert))
        return self.experts.act_fn(self._linear(x, "up_proj", expert))  # type: ignore[no-any-return]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.experts._apply_gate(gate_up)  # type: ignore[no-any-return]

    def _forward_routed(self, hidden_TD: Tensor, top_k_index_Tk: Tensor, top_k_weights_Tk: Tensor) -> Tensor:
        """The experts' forward, [T, D]; routing is what the model passes.

        Gated outputs are rounded and summed over k as transformers' own `grouped_mm` does, so that later layers see what
        they see in the model.
        """
        self.num_tokens += hidden_TD.shape[0]
        dtype = torch.promote_types(hidden_TD.dtype, top_k_weights_Tk.dtype)
        gated_TkD = torch.zeros((*top_k_index_Tk.shape, hidden_TD.shape[1]), dtype=dtype, device=hidden_TD.device)
        for expert in range(self.experts.num_experts):
            a_TF = self._add_unrouted(hidden_TD, expert)
            tokens, places = torch.where(top_k_index_Tk == expert)
            if not len(tokens):
                continue
            gates = top_k_weights_Tk[tokens, places]
            output = self._linear(a_TF[tokens], "down_proj", expert)
            gated_TkD[tokens, places] = output * gates[:, None]
            self._add_routed(expert, gates, gates.float() * output.float().norm(dim=-1))
        return gated_TkD.sum(1).to(hidden_TD.dtype)

    def _add_unrouted(self, hidden_TD: Tensor, expert: int) -> Tensor:
        """Add an expert's activations to the sums that run over all tokens; the activations [T, F]."""
        a_TF = self._activation(hidden_TD, expert)
        self.activation_sum_EF[expert] += a_TF.sum(0, dtype=torch.float32).double()
        return a_TF

    def _add_routed(self, expert: int, gates: Tensor, gated_norms: Tensor) -> None:
        self.num_routed_E[expert] += len(gates)
        self.gate_sum_E[expert] += gates.double().sum()
        self.gated_output_norm_sum_E[expert] += gated_norms.double().sum()

    def result(self) -> PartialStatistics:
        """The sums so far."""
        return PartialStatistics(
            layer=self.layer,
            num_tokens=self.num_tokens,
            num_sampled_G=np.array([self.num_tokens]),
            num_routed_E=self.num_routed_E.long().cpu().numpy(),
            gate_sum_E=self.gate_sum_E.cpu().numpy(),
            activation_sum_EGF=self.activation_sum_EF[:, None].cpu().numpy(),
            gated_output_norm_sum_E=self.gated_output_norm_sum_E.cpu().numpy(),
            router_probability_sum_E=self.router_probability_sum_E.cpu().numpy(),
            router_logit_gram_EE=self.router_logit_gram_EE.cpu().numpy(),
        )


class InputGatedStatistics(LayerStatistics):
    """The same for Llama 4, whose gate multiplies the expert's input.

    Its experts get one block of rows for each expert, [E T, D], gate times x, and zeros where a token is not routed. The mean
    output is still that of x itself; gate-weighted norms are those of what the expert adds, ||E_e(gate x)||.
    """

    def __init__(self, layer: int, experts: Any, router: nn.Module, score: str) -> None:
        super().__init__(layer, experts, router, score)
        self._forward = self._forward_blocks

    def _watch_router(self, _module: nn.Module, args: Any, output: Any) -> None:
        self._hidden_TD: Tensor = args[0]
        self._scores_TE, logits_TE = output
        self._add_logits(logits_TE)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return up * self.experts.act_fn(gate)  # type: ignore[no-any-return]

    def _forward_blocks(self, gated_rows: Tensor) -> Tensor:
        gated_ETD = gated_rows.view(self.experts.num_experts, -1, gated_rows.shape[-1])
        out_ETD = torch.zeros_like(gated_ETD)
        self.num_tokens += gated_ETD.shape[1]
        for expert in range(self.experts.num_experts):
            self._add_unrouted(self._hidden_TD, expert)
            (tokens,) = torch.where(self._scores_TE[:, expert] > 0)
            if not len(tokens):
                continue
            output = self._linear(self._activation(gated_ETD[expert, tokens], expert), "down_proj", expert)
            out_ETD[expert, tokens] = output
            self._add_routed(expert, self._scores_TE[tokens, expert], output.float().norm(dim=-1))
        return out_ETD.view(gated_rows.shape)
