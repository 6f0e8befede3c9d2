"""Statistics of a MoE layer against direct evaluation in float64 and against what the model itself routed.

Dimensions: T tokens, D hidden size, F intermediate size, E experts, k experts a token.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from stages.calibrate.cells import ALL_TOKENS
from stages.calibrate.collectors.registry import DEFAULT
from stages.calibrate.sums import PartialSums, add_up, evidence_of
from stages.calibrate.watcher import Watcher
from stages.calibrate.weight_products import WeightProducts
from stages.contracts.errors import InputError
from stages.contracts.evidence import LayerEvidence
from stages.model.expert_weights import ExpertWeights
from stages.model.families import Family
from tests.tiny import FAMILIES, load, logits, random_ids


def finished(total: PartialSums, experts: Any) -> LayerEvidence:
    return evidence_of(total, DEFAULT, WeightProducts(ExpertWeights(experts)), is_sampled=False)


class Layer:
    """One MoE layer of a whole model: its parts, and everything that the model itself sent through them."""

    def __init__(self, folder: Path, layer: int, ids_ST: np.ndarray) -> None:
        self.model = load(folder)
        self.index, self.ids_ST = layer, ids_ST
        block = self.model.model.layers[layer].mlp
        self.experts, self.router = block.experts, block.gate
        self.block_inputs: list[Tensor] = []
        self.routed: list[tuple[Tensor, ...]] = []
        block.register_forward_pre_hook(lambda _module, args: self.block_inputs.append(args[0].flatten(0, -2)))
        self.experts.register_forward_pre_hook(lambda _module, args: self.routed.append(args))
        self.plain_logits = logits(self.model, ids_ST)
        self.x_TD = torch.cat(self.block_inputs).double()
        _, self.index_Tk, gates_Tk = (torch.cat(parts) for parts in zip(*self.routed, strict=True))
        self.gates_Tk = gates_Tk.double()
        self.num_experts = self.experts.num_experts
        self.router_logits_TE = self.x_TD @ self.router.weight.double().T

    def watcher(self) -> Watcher:
        return Watcher(self.index, ExpertWeights(self.experts), self.router, Family(), ALL_TOKENS, DEFAULT)

    def watch_part(self, ids_ST: np.ndarray) -> PartialSums:
        """What is kept of a token shard."""
        with self.watcher() as watcher:
            logits(self.model, ids_ST)
        return watcher.result()

    def watch(self, ids_ST: np.ndarray) -> tuple[LayerEvidence, Tensor]:
        """Statistics gathered during a forward, and its logits."""
        with self.watcher() as watcher:
            found = logits(self.model, ids_ST)
        return finished(watcher.result(), self.experts), found

    def outputs_of(self, expert: int) -> Tensor:
        """E_e(x) of every token in float64, from the weights' meaning alone."""
        gate_FD, up_FD = self.experts.gate_up_proj[expert].double().chunk(2)
        down_DF = self.experts.down_proj[expert].double()
        return (silu(self.x_TD @ gate_FD.T) * (self.x_TD @ up_FD.T)) @ down_DF.T

    def gates_of(self, expert: int) -> Tensor:
        """The weight that the model gave the expert for every token; 0 where it was not routed."""
        return (self.gates_Tk * (self.index_Tk == expert)).sum(1)


@pytest.fixture(params=FAMILIES)
def layer(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Layer:
    return Layer(tiny_checkpoint(request.param), FAMILIES[request.param].moe_layers[-1], random_ids())


def close(ours: Any, direct: Any) -> None:
    np.testing.assert_allclose(
        np.asarray(ours), np.asarray(direct), rtol=1e-5, atol=1e-6 * float(np.abs(np.asarray(direct)).max())
    )


def test_output_sums_are_those_of_every_expert_on_every_token(layer: Layer) -> None:
    """The mean identity: W_down of the summed activations is the sum of the experts' outputs, un-gated and un-routed."""
    statistics, _ = layer.watch(layer.ids_ST)
    direct_ED = torch.stack([layer.outputs_of(expert).sum(0) for expert in range(layer.num_experts)])
    close(statistics["output_sum"], direct_ED)


def test_counts_and_gate_sums_are_those_of_the_models_own_routing(layer: Layer) -> None:
    statistics, _ = layer.watch(layer.ids_ST)
    counts = [int((layer.index_Tk == expert).sum()) for expert in range(layer.num_experts)]
    assert statistics.num_tokens == layer.ids_ST.size
    assert statistics["num_routed_tokens"].tolist() == counts
    assert sum(counts) == layer.ids_ST.size * 2
    close(statistics["gate_sum"], [layer.gates_of(expert).sum().item() for expert in range(layer.num_experts)])


def test_gated_output_norms_run_over_routed_tokens_only(layer: Layer) -> None:
    """REAP's numerator: gate * ||E_e(x)||."""
    statistics, _ = layer.watch(layer.ids_ST)
    direct = [
        (layer.gates_of(expert) * layer.outputs_of(expert).norm(dim=1)).sum().item() for expert in range(layer.num_experts)
    ]
    close(statistics["gated_output_norm_sum"], direct)


def test_router_probabilities_and_the_gram_of_logits_run_over_all_tokens(layer: Layer) -> None:
    statistics, _ = layer.watch(layer.ids_ST)
    logits_TE = layer.router_logits_TE
    close(statistics["router_probability_sum"], logits_TE.softmax(1).sum(0))
    close(statistics["router_logit_gram"], logits_TE.T @ logits_TE)
    assert statistics["router_probability_sum"].sum() == pytest.approx(layer.ids_ST.size, rel=1e-6)


def test_watching_changes_the_forward_by_rounding_only_and_ends_with_the_context(layer: Layer) -> None:
    _, watched = layer.watch(layer.ids_ST)
    torch.testing.assert_close(watched, layer.plain_logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(layer.model, layer.ids_ST), layer.plain_logits)


def test_sums_over_shards_are_the_sums_of_the_whole(layer: Layer) -> None:
    whole, _ = layer.watch(layer.ids_ST)
    parts = [layer.watch_part(ids_ST) for ids_ST in np.split(layer.ids_ST, [3, 5])]
    total = finished(add_up(parts, DEFAULT), layer.experts)
    assert total.num_tokens == whole.num_tokens
    assert total["num_routed_tokens"].tolist() == whole["num_routed_tokens"].tolist()
    for name, values in whole.columns.items():
        close(total[name], values)


def test_addition_is_float64_in_the_order_given() -> None:
    (usage, *_) = DEFAULT

    def part(value: float) -> PartialSums:
        return PartialSums(3, 1, np.array([1]), {usage.name: {"num_routed_tokens": np.ones(1), "gate_sum": np.array([value])}})

    total = add_up([part(2.0**53), part(1.0), part(-(2.0**53))], [usage])
    assert (total.layer, total.num_tokens, total.num_unrouted_C.tolist()) == (3, 3, [3])
    assert total.sums["usage"]["num_routed_tokens"].tolist() == [3]
    assert total.sums["usage"]["gate_sum"].tolist() == [0.0]
    assert add_up([part(2.0**53), part(-(2.0**53)), part(1.0)], [usage]).sums["usage"]["gate_sum"].tolist() == [1.0]


def test_an_expert_with_infinite_weights_is_named(layer: Layer) -> None:
    layer.experts.down_proj[4, 0, 0] = float("inf")
    with pytest.raises(InputError, match=rf"layer {layer.index}: the outputs or router logits of expert 4 .* not finite"):
        layer.watch(layer.ids_ST)


def test_an_expert_that_no_token_chose_has_an_output_sum_but_no_usage(layer: Layer) -> None:
    x_TD = layer.x_TD.float()
    chosen_Tk = torch.tensor([[0, 3]]).expand(len(x_TD), 2)
    with layer.watcher() as watched:
        out_TD = layer.experts(x_TD, chosen_Tk, torch.tensor([[0.75, 0.5]]).expand(len(x_TD), 2))
    statistics = finished(watched.result(), layer.experts)
    assert statistics["num_routed_tokens"].tolist() == [len(x_TD), 0, 0, len(x_TD), 0, 0]
    assert statistics["gate_sum"].tolist() == [0.75 * len(x_TD), 0, 0, 0.5 * len(x_TD), 0, 0]
    close(statistics["output_sum"][1], layer.outputs_of(1).sum(0))
    close(out_TD, 0.75 * layer.outputs_of(0) + 0.5 * layer.outputs_of(3))
