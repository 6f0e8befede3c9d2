"""Evidence on neurons and weights in every family, and experts whose neurons are permuted copies of others'.

Dimensions: D hidden size, F neurons of an expert, E experts, S tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.calibrate import weight_products
from stages.calibrate.collectors.registry import collectors
from stages.calibrate.spec import CalibrationShardArgs
from stages.calibrate.sums import evidence_of
from stages.calibrate.token_sample import ShardPlace
from stages.calibrate.units import CalibrationShard, open_shard
from stages.calibrate.watcher import Watcher
from stages.calibrate.weight_products import WeightProducts
from stages.checkpoint.neuron_weights import NeuronWeights
from stages.cluster.neurons import permutation, with_neurons
from stages.cluster.plans import merged as merged_plan
from stages.contracts.evidence import LayerEvidence
from stages.contracts.layer_plan import Member
from stages.contracts.method import PlanSettings
from stages.contracts.paths import TENSORS_FILE
from stages.contracts.settings import Clustering, Merging
from stages.contracts.tensors import write_tensors
from stages.model import direct_load
from stages.model.families import SUPPORTED
from stages.model.stream import Stream, pass_through
from tests.runs import token_ids
from tests.stages.test_merge_plans import alone, merged, num_neurons, order, surveyed
from tests.stages.test_quantised import CHECKPOINTS
from tests.tiny import NUM_EXPERTS, build, save

GATHERED = ("weight_gram", "output_gram", "neuron_activations")
HALF = NUM_EXPERTS // 2
CHOICES = [{"align": "weight"}, {"align": "activation"}, {"method": "fix_dominant"}, {"method": "zipit"}]


def copied(source: Path, folder: Path) -> tuple[Path, dict[int, tuple[int, ...]]]:
    """A checkpoint whose experts 4 to 7 are 0 to 3 with their neurons in another order; those orders, by expert."""
    orders = {expert: order(expert, num_neurons(source)) for expert in range(HALF, NUM_EXPERTS)}
    twins = [alone(expert, Member(expert % HALF, 1.0, orders.get(expert))) for expert in range(NUM_EXPERTS)]
    return merged(source, folder, twins), orders


def evidence_by_layer(held: CalibrationShard, folder: Path) -> dict[int, LayerEvidence]:
    """Evidence of all layers, every token kept."""
    _, ids = token_ids(folder)
    watched: dict[int, Watcher] = {}
    place = ShardPlace(ids.numel(), 0, ids.numel(), 1, 1, seed=0)
    gathered = collectors(GATHERED)
    stream = Stream(around=lambda layer: held.watch(layer, watched, gathered=gathered, place=place))
    with torch.inference_mode():
        pass_through(held.shard, ids, len(ids), {"model": stream})
        return {
            layer: evidence_of(one.result(), gathered, WeightProducts(one.weights), False) for layer, one in watched.items()
        }


def opened(model: Path) -> CalibrationShard:
    survey, _ = surveyed(str(model))
    return open_shard(CalibrationShardArgs(str(model), 0, survey.num_layers, 1, survey.routers))


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_permuted_copies_match_neuron_by_neuron_in_every_family(family: str, tmp_path: Path) -> None:
    """And their evidence is that of the weights: products of all parameters, and outputs made of the activations."""
    twins, orders = copied(save(build(family, torch.float32), tmp_path / "source"), tmp_path / "twins")
    held = opened(twins)
    found = evidence_by_layer(held, tmp_path)
    survey, rows = surveyed(str(twins))
    write_tensors(tmp_path / TENSORS_FILE, rows)
    assert sorted(found) == list(survey.moe_layers)
    for layer, evidence in found.items():
        check_products(evidence, held, layer)
        labels_E = np.arange(NUM_EXPERTS) % HALF
        for choice in CHOICES:
            merging = Merging.model_validate(choice)
            plan = merged_plan(evidence, labels_E, PlanSettings(Clustering(num_experts=(HALF,)), merging, None))
            with NeuronWeights(str(twins), tmp_path / TENSORS_FILE, layer) as weights:
                plan = with_neurons(plan, evidence, merging, weights.between if merging.align == "weight" else None, 1 << 30)
            for slot in plan.slots:
                original, copy = slot.members
                names = [
                    dict(enumerate(member.neurons)) if member.neurons else {place: n for n, place in enumerate(member.places)}
                    if member.places else {n: n for n in range(len(orders[copy.expert]))}
                    for member in (original, copy)
                ]  # fmt: skip
                matched = {names[0][place]: names[1][place] for place in names[0]}
                assert all(orders[copy.expert][theirs] == ours for ours, theirs in matched.items()), (layer, choice)


def check_products(evidence: LayerEvidence, held: CalibrationShard, layer: int) -> None:
    weights = held.shard.expert_weights(layer)
    flat = [torch.cat([p[e].double().flatten() for p in weights.experts.parameters()]) for e in range(NUM_EXPERTS)]
    due = np.array([[float(one @ other) for other in flat] for one in flat])
    np.testing.assert_allclose(evidence["weight_gram"], due, rtol=1e-9, atol=1e-9 * np.abs(due).max())
    outputs = []
    for expert, a_SF in enumerate(evidence["neuron_activations"]):
        down_DF = weights.experts.down_proj[expert].double().numpy()
        down_DF = down_DF.T if weights.layout.is_transposed else down_DF
        bias_D = weights.experts.down_proj_bias[expert].double().numpy() if weights.layout.has_bias else 0
        outputs.append(a_SF.astype(np.float64) @ down_DF.T + bias_D)
        np.testing.assert_allclose(outputs[-1].sum(0), evidence["output_sum"][expert], rtol=1e-4, atol=1e-4)
    due = np.array([[(one * other).sum() for other in outputs] for one in outputs])
    np.testing.assert_allclose(evidence["output_gram"], due, rtol=1e-4, atol=1e-5 * np.abs(due).max())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "aria_text", "nemotron_h"])
def test_similarity_by_weights_is_that_of_whole_neurons(family: str, tmp_path: Path) -> None:
    """Row of gate, row of up, column of W_down and biases, from transformers' own module."""
    source = save(build(family, torch.float32), tmp_path / "source")
    survey, rows = surveyed(str(source))
    write_tensors(tmp_path / TENSORS_FILE, rows)
    layer = survey.moe_layers[0]
    weights = opened(source).shard.expert_weights(layer)
    size, layout = weights.intermediate, weights.layout

    def neurons_of(expert: int) -> np.ndarray:
        first = getattr(weights.experts, layout.first)[expert].double()
        first = first.T if layout.is_transposed else first
        down_DF = weights.experts.down_proj[expert].double()
        down_DF = down_DF.T if layout.is_transposed else down_DF
        biases = [getattr(weights.experts, f"{layout.first}_bias")[expert].double()] if layout.has_bias else []
        parts = []
        for neuron in range(size):
            both = [neuron] if not layout.has_gate else [neuron, neuron + size]
            both = [2 * neuron, 2 * neuron + 1] if family == "gpt_oss" else both
            parts.append(torch.cat([first[both].flatten(), down_DF[:, neuron], *(bias[both] for bias in biases)]))
        return torch.stack(parts).numpy()

    with NeuronWeights(str(source), tmp_path / TENSORS_FILE, layer) as found:
        np.testing.assert_allclose(found.between(2, 5), neurons_of(2) @ neurons_of(5).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", sorted(CHECKPOINTS))
def test_neurons_of_a_quantised_source_are_compared_by_its_values(scheme: str, tmp_path: Path) -> None:
    quantised, plain = CHECKPOINTS[scheme](tmp_path)
    found = []
    for folder in (quantised, plain):
        survey, rows = surveyed(str(folder))
        table = tmp_path / f"{folder.name}-{TENSORS_FILE}"
        write_tensors(table, rows)
        with NeuronWeights(str(folder), table, survey.moe_layers[0]) as weights:
            found.append(weights.between(0, 1))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert permutation(found[0]) == permutation(found[1])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "llama4_text"])
def test_evidence_of_mapped_weights_is_that_of_loaded_ones(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(build(family, torch.float32), tmp_path / "source")
    loaded = evidence_by_layer(opened(source), tmp_path)
    monkeypatch.setattr(direct_load, "MAPPED_BYTES", 0)
    held = opened(source)
    assert held.shard.expert_weights(next(iter(loaded))).experts.down_proj.is_meta
    for layer, evidence in evidence_by_layer(held, tmp_path).items():
        for name in GATHERED:
            due = loaded[layer][name]
            np.testing.assert_allclose(evidence[name], due, rtol=1e-5, atol=1e-5 * np.abs(due).max(), err_msg=name)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made._base is None:
            self.num_bytes = max(self.num_bytes, made.nbytes)
        return made


def test_products_of_weights_make_no_copy_of_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = opened(save(build("mixtral", torch.bfloat16), tmp_path / "source"))
    weights = held.shard.expert_weights(0)
    monkeypatch.setattr(weight_products, "_GRAM_VALUES", 2048)
    with torch.inference_mode(), Largest() as largest:
        assert WeightProducts(weights).gram.shape == (NUM_EXPERTS, NUM_EXPERTS)
    assert 0 < largest.num_bytes <= 8 * 2048 < 2 * weights.experts.down_proj.numel()
