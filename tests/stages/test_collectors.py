"""Collectors: sums over token shards are the sums of the whole, and a further one is a class and a line of registration.

Dimensions: E experts, R routed pairs, S sequences, T tokens, C cells.
"""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import silu

from stages.calibrate import weight_products
from stages.calibrate.cells import ALL_TOKENS, Cells, Sample
from stages.calibrate.collectors import neuron_activations, output_gram, sampled_outputs
from stages.calibrate.collectors.base import Collector, Sums
from stages.calibrate.collectors.registry import DEFAULT, FURTHER, collectors, gathering, register
from stages.calibrate.observations import RoutedView
from stages.calibrate.spec import CalibrateArgs, CalibrationShardArgs, ReduceArgs
from stages.calibrate.sums import PartialSums, add_up, evidence_of, read_partial_sums, write_partial_sums
from stages.calibrate.token_sample import ShardPlace, TokenSample, num_sampled
from stages.calibrate.units import calibrate_unit, open_shard, reduce_unit
from stages.calibrate.watcher import Watcher
from stages.calibrate.weight_products import WeightProducts
from stages.contracts.arrow import read_table
from stages.contracts.errors import InputError
from stages.contracts.evidence import Column, LayerEvidence, read_evidence
from stages.contracts.paths import column_file, domain_dir, partial_evidence_file, statistics_file, tokens_file
from stages.contracts.stream_units import StreamArgs
from stages.contracts.texts import DomainShards
from stages.contracts.tokens import write_tokens
from stages.contracts.units import HeldJob
from stages.model.expert_weights import ExpertWeights
from stages.model.families import Family
from stages.model.survey import survey_checkpoint
from tests.conftest import REPOSITORY
from tests.stages.test_statistics import Layer, close
from tests.tiny import FAMILIES, logits, random_ids

NUM_SEQUENCES, LENGTH = random_ids().shape
GATHERED = (
    "output_norms", "output_norm", "gated_output", "neuron_importance", "largest_down_output", "sampled_outputs", "weight_gram",
    "output_gram", "neuron_activations",
)  # fmt: skip


class OutputNorms(Collector):
    """Largest output of each expert over its routed tokens, which adds up by maximum, and the sum of norms by cell."""

    name = "output_norms"
    columns = (
        Column("largest_output_norm", "largest ||E_e(x)||_2 over routed tokens"),
        Column("cell_norm_sum", "sum over routed tokens of each cell of ||E_e(x)||_2", "[C]"),
    )

    def observe_routed(self, sums: Sums, routed: RoutedView) -> None:
        pairs = routed.pairs
        norms_R = pairs.output_RD.double().norm(dim=1)
        for expert, some_R in enumerate(norms_R.split(pairs.sizes), pairs.first):
            if len(some_R):
                sums["largest_output_norm"][expert].clamp_(min=some_R.max())
        sums["cell_norm_sum"][pairs.experts] += routed.sum_by_cell(norms_R)

    def add(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            "largest_output_norm": np.maximum(one["largest_output_norm"], other["largest_output_norm"]),
            "cell_norm_sum": one["cell_norm_sum"] + other["cell_norm_sum"],
        }


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register(OutputNorms())
    yield
    del FURTHER["output_norms"]


@pytest.fixture
def layer(tiny_checkpoint: Callable[[str], Path]) -> Layer:
    return Layer(tiny_checkpoint("mixtral"), FAMILIES["mixtral"].moe_layers[-1], random_ids())


MOST = {"neuron_activations": 85, "sampled_outputs": 7}
"""Tokens that collectors keep, of 256."""


def whole_place(num_tokens: int = NUM_SEQUENCES * LENGTH, first: int = 0) -> ShardPlace:
    """The place of some tokens in a set of 256 without domains."""
    return ShardPlace(num_tokens, first, NUM_SEQUENCES * LENGTH, NUM_SEQUENCES, NUM_SEQUENCES, seed=1)


PLACES = {name: TokenSample.of(whole_place(), most).places_N for name, most in MOST.items()}


@pytest.fixture(autouse=True)
def few_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_activations, "_MOST_TOKENS", MOST["neuron_activations"])
    monkeypatch.setattr(sampled_outputs, "_MOST_TOKENS", MOST["sampled_outputs"])
    monkeypatch.setattr(sampled_outputs, "_BLOCK_VALUES", 1)


BIAS = torch.linspace(1, 2, FAMILIES["mixtral"].num_experts)


def watched(layer: Layer, ids_ST: np.ndarray, cells: Cells, first: int = 0) -> PartialSums:
    """first: the sequence of the calibration set with which the token shard begins."""
    weights, place = ExpertWeights(layer.experts), whole_place(ids_ST.size, first * LENGTH)
    parts = (weights, layer.router, Family(), cells, collectors(GATHERED), place, BIAS)
    with Watcher(layer.index, *parts) as watcher:
        logits(layer.model, ids_ST)
    return watcher.result()


def all_tokens(first: int) -> Cells:
    return ALL_TOKENS


def sampled(first: int) -> Cells:
    return Sample(0.25, 3, NUM_SEQUENCES, LENGTH, seed=0, first_sequence=first)


@pytest.mark.parametrize("cells_from", [all_tokens, sampled])
def test_sums_of_every_collector_over_shards_are_those_of_the_whole(
    layer: Layer, cells_from: Callable[[int], Cells], tmp_path: Path
) -> None:
    gathered = collectors(GATHERED)
    whole = watched(layer, layer.ids_ST, cells_from(0))
    parts = []
    for first, stop in ((0, 3), (3, 5), (5, NUM_SEQUENCES)):
        write_partial_sums(tmp_path / f"{first}", watched(layer, layer.ids_ST[first:stop], cells_from(first), first))
        parts.append(read_partial_sums(tmp_path / f"{first}"))
    total = add_up(parts, gathered)
    assert (total.layer, total.num_tokens) == (whole.layer, whole.num_tokens)
    assert total.num_unrouted_C.tolist() == whole.num_unrouted_C.tolist()
    assert list(whole.sums) == list(total.sums) == [collector.name for collector in gathered]
    for collector in gathered:
        assert set(whole.sums[collector.name]) == {kept.name for kept in collector.sums}
        for name, values in whole.sums[collector.name].items() if collector.name != "neuron_activations" else ():  # kept apart
            assert np.abs(values).max() > 0
            close(total.sums[collector.name][name], values)
    products = WeightProducts(ExpertWeights(layer.experts))
    ours, theirs = (evidence_of(sums, gathered, products, cells_from is sampled) for sums in (total, whole))
    for name, values in theirs.columns.items():
        close(ours[name], values)


def test_sums_by_cell_are_those_of_the_sequences_of_each_cell(layer: Layer) -> None:
    cells = sampled(0)
    found = watched(layer, layer.ids_ST, cells).sums["output_norms"]["cell_norm_sum"]
    total = watched(layer, layer.ids_ST, ALL_TOKENS).sums["output_norms"]["cell_norm_sum"]
    assert (found.shape, total.shape) == ((layer.num_experts, 3), (layer.num_experts, 1))
    close(found.sum(1, keepdims=True), total)
    cell_T = cells.of_tokens(0, layer.ids_ST.size)
    for expert in range(layer.num_experts):
        norms_T = layer.outputs_of(expert).norm(dim=1) * (layer.gates_of(expert) > 0)
        close(found[expert], [norms_T[cell_T == cell].sum() for cell in range(3)])


def test_further_sums_are_what_their_columns_say(layer: Layer) -> None:
    evidence = evidence_of(
        watched(layer, layer.ids_ST, ALL_TOKENS), collectors(GATHERED), WeightProducts(ExpertWeights(layer.experts)), False
    )
    for expert in range(layer.num_experts):
        gates_T, outputs_TD = layer.gates_of(expert), layer.outputs_of(expert)
        close(evidence["output_norm_sum"][expert], outputs_TD[gates_T > 0].norm(dim=1).sum())
        close(evidence["gated_output_sum"][expert], (gates_T[:, None] * outputs_TD).sum(0))
        gate_FD, up_FD = layer.experts.gate_up_proj[expert].double().chunk(2)
        a_TF = silu(layer.x_TD @ gate_FD.T) * (layer.x_TD @ up_FD.T)
        norms_F = layer.experts.down_proj[expert].double().square().sum(0)
        close(evidence["neuron_importance_sum"][expert], (gates_T[:, None] * a_TF).square().sum(0) * norms_F)
        close(evidence["largest_down_output"][expert], outputs_TD[gates_T > 0].abs().max())
        close(evidence["sampled_gates"][expert], gates_T[PLACES["sampled_outputs"]])
        close(evidence["sampled_logits"][expert], layer.router_logits_TE[PLACES["sampled_outputs"], expert])
        for other in range(layer.num_experts):
            products = [float(outputs_TD[place] @ layer.outputs_of(other)[place]) for place in PLACES["sampled_outputs"]]
            np.testing.assert_allclose(evidence["sampled_output_gram"][expert, :, other], products, rtol=1e-4, atol=1e-5)
        close(evidence["neuron_activations"][expert], a_TF[PLACES["neuron_activations"]])
    assert evidence["neuron_activations"].dtype == np.float32
    outputs = [layer.outputs_of(expert).flatten() for expert in range(layer.num_experts)]
    weights = [torch.cat([w[expert].double().flatten() for w in (layer.experts.gate_up_proj, layer.experts.down_proj)])
               for expert in range(layer.num_experts)]  # fmt: skip
    for name, vectors in (("output_gram", outputs), ("weight_gram", weights)):
        close(evidence[name], [[float(one @ other) for other in vectors] for one in vectors])
    assert evidence["router_choice_bias"].tolist() == BIAS.double().tolist()


def test_the_outputs_of_a_sample_are_multiplied_on_its_tokens(layer: Layer) -> None:
    cells = sampled(0)
    evidence = evidence_of(
        watched(layer, layer.ids_ST, cells), collectors(GATHERED), WeightProducts(ExpertWeights(layer.experts)), True
    )
    tokens = torch.cat([chosen for _, chosen in cells.unrouted(0, layer.ids_ST.size)])
    outputs = [layer.outputs_of(expert)[tokens].flatten() for expert in range(layer.num_experts)]
    close(evidence["output_gram"], [[float(one @ other) for other in outputs] for one in outputs])


def test_products_of_outputs_and_weights_do_not_depend_on_their_blocks(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few tokens and of single rows, which do not divide what there is."""
    weights = ExpertWeights(layer.experts)
    found = []
    for is_small in (False, True):
        if is_small:
            monkeypatch.setattr(output_gram, "_BLOCK_BYTES", 1)
            monkeypatch.setattr(output_gram, "_LEAST_BLOCK", 7)
            monkeypatch.setattr(output_gram, "_PIECE_VALUES", 3 * layer.num_experts * weights.hidden_size)
            monkeypatch.setattr(weight_products, "_GRAM_VALUES", 5 * layer.num_experts * weights.hidden_size)
        found.append(
            evidence_of(watched(layer, layer.ids_ST, ALL_TOKENS), collectors(GATHERED), WeightProducts(weights), False)
        )
    for name in ("output_gram", "weight_gram"):
        close(found[1][name], found[0][name])


def test_a_token_shard_without_a_sampled_token_is_stored(layer: Layer, tmp_path: Path) -> None:
    weights, gathered = ExpertWeights(layer.experts), collectors(["neuron_activations"])
    place = ShardPlace(layer.ids_ST.size, 10**6, 10**7, 1, 1000, seed=0)
    assert not len(TokenSample.of(place, MOST["neuron_activations"]).places_N)
    with Watcher(layer.index, weights, layer.router, Family(), ALL_TOKENS, gathered, place) as watcher:
        logits(layer.model, layer.ids_ST)
    write_partial_sums(tmp_path / "empty", watcher.result())
    kept = read_partial_sums(tmp_path / "empty").sums["neuron_activations"]["a"]
    assert kept.shape == (layer.num_experts, 0, weights.intermediate)


@pytest.mark.parametrize("num_tokens", [1, 5, 64, 1000, 4097])
@pytest.mark.parametrize("most", [1, 3, 50, 999, 4096])
@pytest.mark.parametrize(("domain", "all_sequences"), [(1, 1), (2, 5), (1, 40)])
def test_the_sampled_tokens_do_not_depend_on_shards_and_micro_batches(
    num_tokens: int, most: int, domain: int, all_sequences: int
) -> None:
    """There are as many as `plan` states. The domain is cut into that many equal stretches, and each has one of them."""
    place = ShardPlace(num_tokens, 0, num_tokens, domain, all_sequences, seed=3)
    whole = TokenSample.of(place, most).places_N.tolist()
    count = num_sampled(most, num_tokens, domain, all_sequences)
    assert len(whole) == count == min(num_tokens, max(1, most * domain // all_sequences))
    assert all(i * num_tokens // count <= token < (i + 1) * num_tokens // count for i, token in enumerate(whole))
    for shard_tokens, batch in ((7, 7), (12, 5), (640, 64)):
        found = []
        for first in range(0, num_tokens, shard_tokens):
            size, rows = min(shard_tokens, num_tokens - first), list[int]()
            sample = TokenSample.of(replace(place, num_tokens=size, first=first), most)
            for seen in range(0, size, batch):
                row, tokens = sample.within(seen, min(batch, size - seen))
                rows += range(row, row + len(tokens))
                found += [first + seen + token for token in tokens.tolist()]
            assert rows == list(range(len(sample.places_N)))
        assert found == whole


def test_sampled_tokens_are_not_at_the_same_places_of_every_sequence() -> None:
    places = TokenSample.of(ShardPlace(2**15, 0, 2**15, 1, 1, seed=0), 2**9).places_N
    assert len(set((places % 64).tolist())) > 32


def test_each_collector_decides_how_many_tokens_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_activations, "_MOST_TOKENS", 4096)
    monkeypatch.setattr(sampled_outputs, "_MOST_TOKENS", 1024)

    def most(name: str, num_experts: int, num_neurons: int) -> int:
        kept = FURTHER[name].keeps(num_experts, num_neurons)
        assert kept is not None
        return kept.most

    assert [most("sampled_outputs", experts, 10) for experts in (8, 64, 128, 256)] == [1024, 1024, 256, 64]
    sizes = ((8, 14336), (128, 768), (256, 2048), (8, 8), (2, 10**9))
    assert [most("neuron_activations", *size) for size in sizes] == [585, 682, 128, 4096, 1]
    assert [name for name, one in FURTHER.items() if one.keeps(8, 8)] == ["sampled_outputs", "neuron_activations"]


def test_output_sums_by_cell_run_over_the_sampled_tokens_of_each_cell(layer: Layer) -> None:
    cells = sampled(0)
    part = watched(layer, layer.ids_ST, cells)
    groups = evidence_of(part, collectors(GATHERED), WeightProducts(ExpertWeights(layer.experts)), is_sampled=True).groups
    assert groups is not None
    chosen = dict(cells.unrouted(0, layer.ids_ST.size))
    assert groups.num_tokens_G.tolist() == [len(chosen[cell]) for cell in range(3)]
    for expert in range(layer.num_experts):
        outputs_TD = layer.outputs_of(expert)
        close(groups.output_sum_EGD[expert], torch.stack([outputs_TD[chosen[cell]].sum(0) for cell in range(3)]))


@pytest.fixture
def evidence_dir(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """Evidence of mixtral from two token shards, by the units of calibrate."""
    folder = tiny_checkpoint("mixtral")
    survey, _ = survey_checkpoint(str(folder))
    held = open_shard(CalibrationShardArgs(str(folder), 0, survey.num_layers, 1, survey.routers))
    (tmp_path / "tokens").mkdir()
    for shard, ids_ST in enumerate(np.split(random_ids(), 2)):
        write_tokens(tmp_path / "tokens" / tokens_file(shard), ids_ST)
        args = CalibrateArgs(StreamArgs("tokens", shard, 2, is_last=True), None, gathering({"gate_sum", "largest_output_norm"}))
        calibrate_unit(HeldJob(tmp_path, tmp_path / "calibrate", args, held))
    for layer in survey.moe_layers:
        reduced = ReduceArgs(layer, (DomainShards("", 0, 2),), is_sampled=False, collectors=("output_norms",))
        result = reduce_unit(HeldJob(tmp_path, tmp_path / "calibrate", reduced, held))
        assert [file.path.name for file in result.files] == [
            f"layer-{layer:04d}.{name}.arrow" for name in ("statistics", "largest_output_norm", "cell_norm_sum")
        ]  # fmt: skip
    return tmp_path / "calibrate"


def test_products_of_weights_are_computed_once_for_all_domains(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tiny_checkpoint("mixtral"), list[WeightProducts]()
    of = WeightProducts.gram.func

    def counted(products: WeightProducts) -> np.ndarray:
        made.append(products)
        return of(products)

    counting = cached_property(counted)
    counting.__set_name__(WeightProducts, "gram")
    monkeypatch.setattr(WeightProducts, "gram", counting)
    survey, _ = survey_checkpoint(str(folder))
    held = open_shard(CalibrationShardArgs(str(folder), 0, survey.num_layers, 1, survey.routers))
    (tmp_path / "tokens").mkdir()
    for shard, ids_ST in enumerate(np.split(random_ids(), 2)):
        write_tokens(tmp_path / "tokens" / tokens_file(shard), ids_ST)
        args = CalibrateArgs(StreamArgs("tokens", shard, 2, is_last=True), None, ("weight_gram",))
        calibrate_unit(HeldJob(tmp_path, tmp_path / "calibrate", args, held))
    layer, domains = survey.moe_layers[-1], (DomainShards("a", 0, 1), DomainShards("b", 1, 2))
    reduce_unit(HeldJob(tmp_path, tmp_path / "calibrate", ReduceArgs(layer, domains, False, ("weight_gram",)), held))
    assert len(made) == 1
    dirs = [domain_dir(tmp_path / "calibrate", domain.name) for domain in domains]
    one, other = (read_evidence(folder, layer, ["weight_gram"])["weight_gram"] for folder in dirs)
    np.testing.assert_array_equal(one, other)
    assert (one.diagonal() > 0).all()


def test_a_further_column_has_a_file_that_says_what_it_means(layer: Layer, evidence_dir: Path) -> None:
    evidence = read_evidence(evidence_dir, layer.index, ["largest_output_norm", "cell_norm_sum", "gate_sum"])
    norms_ET = np.stack([layer.outputs_of(expert).norm(dim=1).numpy() for expert in range(layer.num_experts)])
    is_routed_ET = np.stack([layer.gates_of(expert).numpy() > 0 for expert in range(layer.num_experts)])
    close(evidence["largest_output_norm"], np.where(is_routed_ET, norms_ET, 0).max(1))
    assert evidence["cell_norm_sum"].shape == (layer.num_experts, 1)
    schema = read_table(column_file(evidence_dir, layer.index, "cell_norm_sum")).schema
    assert schema.names == ["layer", "expert", "num_tokens", "cell_norm_sum"]
    assert schema.field("cell_norm_sum").type == pa.list_(pa.float64(), 1)
    assert schema.metadata[b"cell_norm_sum"].decode() == f"[C] {OutputNorms.columns[1].meaning}"


def test_a_column_that_was_not_gathered_is_named_with_the_remedy(layer: Layer, evidence_dir: Path) -> None:
    evidence = read_evidence(evidence_dir, layer.index)
    assert isinstance(evidence, LayerEvidence)
    with pytest.raises(InputError, match=rf"layer {layer.index}: .* no column largest_output_norm, only gate_sum, .* requires"):
        evidence["largest_output_norm"]


def test_statistics_do_not_depend_on_what_else_is_gathered(layer: Layer, evidence_dir: Path) -> None:
    paths = [partial_evidence_file(evidence_dir, layer.index, shard) for shard in range(2)]
    total = add_up([read_partial_sums(path) for path in paths], DEFAULT)
    alone = evidence_of(total, DEFAULT, WeightProducts(ExpertWeights(layer.experts)), is_sampled=False)
    table = read_table(statistics_file(evidence_dir, layer.index))
    found = read_evidence(evidence_dir, layer.index)
    assert "cell_norm_sum" not in table.column_names
    for name, values in alone.columns.items():
        np.testing.assert_array_equal(found[name], values)


def test_required_columns_choose_the_collectors() -> None:
    assert gathering([]) == gathering(["gate_sum", "output_sum"]) == ()
    assert gathering(["cell_norm_sum", "largest_output_norm", "gate_sum"]) == ("output_norms",)
    with pytest.raises(InputError, match=r"no collector gathers colour; there are cell_norm_sum, gate_sum, .*output_sum"):
        gathering(["colour"])


def test_names_of_collectors_and_columns_are_taken_once() -> None:
    class Twin(Collector):
        name = "twin"
        columns = (Column("gate_sum", "again"),)

    class Statistics(Collector):
        name = "new"
        columns = (Column("statistics", "the name of the file is taken"),)

    for wrong in (OutputNorms(), Twin(), Statistics()):
        with pytest.raises(AssertionError, match="taken"):
            register(wrong)
    assert set(FURTHER) == set(GATHERED)


def test_what_collectors_declare_is_read_without_torch() -> None:
    code = (
        "import sys; from stages.calibrate.collectors.registry import DEFAULT, gathering; gathering(['gate_sum']);"
        "print([one.sums for one in DEFAULT]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=300)


def test_a_watched_layer_runs_as_before_once_the_watcher_has_left(layer: Layer) -> None:
    weights = ExpertWeights(layer.experts)
    with pytest.raises(RuntimeError, match="stop"), Watcher(layer.index, weights, layer.router, Family(), ALL_TOKENS, DEFAULT):
        raise RuntimeError("stop")
    assert torch.equal(logits(layer.model, layer.ids_ST), layer.plain_logits)


def test_sums_are_added_up_one_token_shard_at_a_time() -> None:
    size = 1 << 20

    class Large(Collector):
        name, columns = "large", (Column("large", "ones", "[D]"),)

    def parts(count: int) -> Iterator[PartialSums]:
        for _ in range(count):
            yield PartialSums(0, 1, np.ones(1, dtype=np.int64), {"large": {"large": np.ones((1, size // 8))}})

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            assert add_up(parts(count), [Large()]).sums["large"]["large"][0, 0] == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(64) < 2 * peak(4)
    assert peak(64) < 5 * size
