"""Sampling mode: what is sampled, what stays exact, and what is then said of the means and the labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.calibrate.cells import ALL_TOKENS, Sample
from stages.calibrate.collectors.registry import DEFAULT
from stages.calibrate.sums import PartialSums, evidence_of
from stages.calibrate.watcher import Watcher
from stages.calibrate.weight_products import WeightProducts
from stages.cluster.certainty import adjusted_rand_index, halves, relative_standard_errors
from stages.contracts.certainty import read_errors, read_stability
from stages.contracts.dendrogram import read_labels
from stages.contracts.evidence import LayerEvidence, OutputGroups, read_evidence
from stages.contracts.paths import errors_file, labels_file, stability_file
from stages.model.expert_weights import ExpertWeights
from stages.model.families import Family
from tests.runs import FinishedRun, run_all, token_ids, write_run_file
from tests.tiny import FAMILIES, build, load, logits, random_ids, save

NUM_SEQUENCES, LENGTH = random_ids().shape


def sample(fraction: float, groups: int = 4, first: int = 0, seed: int = 0) -> Sample:
    return Sample(fraction, groups, NUM_SEQUENCES, LENGTH, seed, first)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.3, 0.99, 1.0])
def test_sampled_places_are_distinct_spread_over_the_sequence_and_of_the_asked_number(fraction: float) -> None:
    for sequence in range(NUM_SEQUENCES):
        places = sample(fraction).positions(sequence)
        assert len(places) == max(1, round(fraction * LENGTH)) == len(set(places.tolist()))
        assert 0 <= places.min() <= places.max() < LENGTH
        gaps = np.diff([*places, places[0] + LENGTH])
        assert gaps.max() - gaps.min() <= 1


def test_groups_share_the_sequences_out_evenly_and_by_the_seed() -> None:
    dealt = [[sample(1, groups=3, seed=seed).group(n) for n in range(NUM_SEQUENCES)] for seed in range(3)]
    sizes = [np.bincount(groups, minlength=3) for groups in dealt]
    assert all(size.max() - size.min() <= 1 for size in sizes)
    assert len({tuple(groups) for groups in dealt}) > 1


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_what_is_sampled_does_not_depend_on_token_shards(cut: int) -> None:
    def tokens(first: int, count: int) -> set[tuple[int, int]]:
        chosen = sample(0.25, first=first).unrouted(0, count * LENGTH)
        return {(group, first * LENGTH + int(index)) for group, indices in chosen for index in indices}

    parts = [tokens(first, cut) for first in range(0, NUM_SEQUENCES, cut)]
    assert set().union(*parts) == tokens(0, NUM_SEQUENCES)


@pytest.fixture(params=FAMILIES)
def watched(request: pytest.FixtureRequest, tiny_checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    model = load(tiny_checkpoint(request.param))
    layer = FAMILIES[request.param].moe_layers[-1]
    block = model.model.layers[layer].mlp

    def watch(chosen: Sample | None) -> tuple[LayerEvidence, PartialSums, int]:
        weights = ExpertWeights(block.experts)
        watcher = Watcher(layer, weights, block.gate, Family(), ALL_TOKENS if chosen is None else chosen, DEFAULT)
        with FlopCounterMode(display=False) as counter, watcher:
            logits(model, random_ids())
        total = watcher.result()
        return evidence_of(total, DEFAULT, WeightProducts(weights), chosen is not None), total, counter.get_total_flops()

    watch.shape = (block.experts.num_experts, *block.experts.down_proj.shape[1:])  # type: ignore[attr-defined]
    return watch


def test_all_tokens_in_groups_give_the_exact_sums_to_rounding(watched: Callable[..., Any]) -> None:
    """Activations are summed in float32 inside of a micro-batch, whose cut to groups differs: 2^-24 of their size each."""
    exact, _, _ = watched(None)
    grouped, total, _ = watched(sample(1.0))
    assert total.num_unrouted_C.sum() == grouped.num_output_tokens == exact.num_tokens
    np.testing.assert_allclose(
        grouped["output_sum"], exact["output_sum"], rtol=0, atol=1e-5 * np.abs(exact["output_sum"]).max()
    )


def test_what_is_routed_stays_exact_under_sampling(watched: Callable[..., Any]) -> None:
    exact, _, _ = watched(None)
    sampled, total, _ = watched(sample(0.25))
    assert total.num_unrouted_C.sum() == round(0.25 * LENGTH) * NUM_SEQUENCES
    assert sampled.num_tokens == exact.num_tokens
    assert sampled["num_routed_tokens"].tolist() == exact["num_routed_tokens"].tolist()
    for name in ("gate_sum", "gated_output_norm_sum", "router_probability_sum", "router_logit_gram"):
        np.testing.assert_allclose(sampled[name], exact[name], rtol=1e-5)


def test_operations_fall_by_what_is_not_sampled(watched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """W_gate and W_up of every expert on a fraction of the tokens, and on the k routed to, instead of on all tokens.

    Without the rows of padding, which depend on the routing.
    """
    monkeypatch.setattr("stages.model.experts_forward.padded", lambda num_rows, device: num_rows)
    num_experts, hidden, intermediate = watched.shape  # type: ignore[attr-defined]
    (_, _, all_flops), (_, _, flops) = watched(None), watched(sample(0.25))
    num_tokens = NUM_SEQUENCES * LENGTH
    first_products = 2 * 2 * hidden * intermediate
    assert all_flops - flops == first_products * num_tokens * (num_experts - 2 - 0.25 * num_experts)


def test_the_standard_error_shrinks_with_the_root_of_the_number_of_groups() -> None:
    """Independent groups of unit variance a dimension: the error of the mean is sqrt(D / n). 200 experts and 16 dimensions
    leave the mean over experts a standard error below 1%, so 5% is five of them."""
    chance = np.random.default_rng(0)
    for groups, tokens in ((8, 1), (32, 1), (8, 16), (128, 4)):
        mean_EGD = 5 + chance.standard_normal((200, groups, 16)) / np.sqrt(tokens)
        errors_E = relative_standard_errors(OutputGroups(np.full(groups, tokens), mean_EGD * tokens))
        expected = np.sqrt(16 / (groups * tokens)) / np.sqrt(16 * 25)
        assert np.sqrt(np.square(errors_E).mean()) == pytest.approx(expected, rel=0.05)


def test_the_adjusted_rand_index_of_known_clusterings() -> None:
    one = np.array([0, 0, 0, 1, 1, 1])
    assert adjusted_rand_index(one, one) == 1
    assert adjusted_rand_index(one, np.array([0, 0, 1, 1, 2, 2])) == pytest.approx(8 / 33)  # of 15 pairs 6, 3, and 2 in both
    assert adjusted_rand_index(np.arange(6), np.arange(6)) == 1
    assert adjusted_rand_index(np.zeros(6, dtype=int), np.arange(6)) == 0


def test_halves_are_halves_and_follow_from_the_seed() -> None:
    drawn = [half.tolist() for half in halves(7, seed=3)]
    assert all(len(half) == len(set(half)) == 3 for half in drawn)
    assert drawn == [half.tolist() for half in halves(7, seed=3)]
    assert drawn != [half.tolist() for half in halves(7, seed=4)]


def sampled_run(folder: Path, done: FinishedRun, sampling: dict[str, Any]) -> FinishedRun:
    changes = {"calibration.sampling": sampling, "clustering.num_experts": [6, 3]}
    return FinishedRun.of(write_run_file(folder, done.source, Path(done.config.calibration.data[0]), changes))


def test_a_run_with_all_tokens_has_the_exact_labels_and_says_how_stable_they_are(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun]
) -> None:
    done = finished_run("mixtral")
    assert "certainty" not in done.report
    assert not list(done.run_dir.rglob("*.groups.arrow"))
    run = sampled_run(tmp_path, done, {"fraction": 1, "groups": 4})
    (layer, *_) = FAMILIES["mixtral"].moe_layers
    folder, exact_folder = run.cluster_dir, done.cluster_dir
    for count in (6, 3):
        labels = read_labels(labels_file(folder, layer), count)
        assert labels.tolist() == read_labels(labels_file(exact_folder, layer), count).tolist()
    rows = [read_stability(stability_file(folder, layer), count) for count in range(1, 7)]
    assert [row["num_clusters"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0]["equal_share"] == rows[-1]["equal_share"] == 1, "one cluster, and one an expert, leave no choice"
    assert all(0 <= row["equal_share"] <= 1 for row in rows)
    errors = read_errors(errors_file(folder, layer))
    certainty = run.report["certainty"]
    assert certainty["relative_standard_errors"][str(layer)] == errors
    assert 0 < certainty["mean_relative_standard_error"] <= certainty["largest_relative_standard_error"]
    assert certainty["stability"]["3e"]["layers"][str(layer)] == rows[2]
    assert certainty["stability"]["6e"]["equal_share"] == 1


@pytest.mark.parametrize("family", ["llama4_text", "gpt_oss"])
def test_all_tokens_in_groups_give_the_exact_sums_where_gates_multiply_inputs_and_where_there_are_biases(
    family: str, tmp_path: Path
) -> None:
    source = save(build(family, torch.float32), tmp_path / "tiny")
    path, ids = token_ids(tmp_path)
    found: list[list[LayerEvidence]] = []
    for name, more in {"exact": {}, "grouped": {"sampling": {"fraction": 1, "groups": 2}}}.items():
        calibration = {"data": str(path), "num_sequences": len(ids), "sequence_length": ids.shape[1], **more}
        run_all(source, tmp_path / name, path, [4], ["stock"], calibration=calibration)
        (folder,) = (tmp_path / name).glob("calibrate-*")
        layers = sorted(int(file.name[6:10]) for file in folder.glob("*.statistics.arrow"))
        found.append([read_evidence(folder, layer) for layer in layers])
    for exact, grouped in zip(*found, strict=True):
        assert exact["num_routed_tokens"].tolist() == grouped["num_routed_tokens"].tolist()
        size = np.abs(exact["output_sum"]).max()
        np.testing.assert_allclose(grouped["output_sum"], exact["output_sum"], rtol=0, atol=1e-5 * size)


def test_the_run_keeps_what_is_routed_exact_and_its_groups_add_up(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun]
) -> None:
    done = finished_run("mixtral")
    run = sampled_run(tmp_path, done, {"fraction": 0.5, "groups": 3})
    (layer, *_) = FAMILIES["mixtral"].moe_layers
    evidence, exact = (read_evidence(one.calibrate_dir, layer) for one in (run, done))
    assert evidence.groups is not None and exact.groups is None
    assert evidence.num_output_tokens == evidence.groups.num_tokens_G.sum() == exact.num_output_tokens // 2
    np.testing.assert_array_equal(evidence.groups.output_sum_EGD.sum(1), evidence["output_sum"])
    assert evidence["num_routed_tokens"].tolist() == exact["num_routed_tokens"].tolist()
    assert run.part("calibrate").key != done.part("calibrate").key
    assert run.part("prepare", "calibration").key == done.part("prepare", "calibration").key
