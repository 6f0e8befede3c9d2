"""Parity with what the authors' HC-SMoE code computes in float32; see `golden/README.md` in the shared folder.

Dimensions: L layers, E experts, D hidden size, R merged experts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.contracts.dendrogram import read_labels
from stages.contracts.evidence import read_evidence
from stages.contracts.paths import labels_file
from tests.runs import FinishedRun, write_run_file
from tests.tiny import load, logits

NAME = "mixtral-tiny-fp32"
CASES = [(linkage, merge) for linkage in ("average", "single") for merge in ("freq", "weighted-avg")]
METHODS = {"freq": "frequency", "weighted-avg": "average"}


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    folder = shared / "golden"
    if not (folder / NAME / "model.safetensors").exists():
        pytest.skip(f"{folder / NAME} is not there")
    return folder


@pytest.fixture(scope="session")
def reference(golden: Path) -> dict[str, torch.Tensor]:
    return load_file(golden / "results.safetensors")


@pytest.fixture(scope="session")
def records(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "results.json").read_text())


def record_name(linkage: str, merge: str, num_experts: int) -> str:
    return f"{NAME}/expert-output/hierarchical-{linkage}/{merge}/g{num_experts}"


@pytest.fixture(scope="session")
def golden_runs(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], FinishedRun]:
    """Every linkage and merge method of the reference, in one run directory: one calibration."""
    folder = tmp_path_factory.mktemp("golden")
    settings = {
        "calibration": {
            "data": str(golden / "calib_tokens.npy"),
            "num_sequences": 16,
            "sequence_length": 128,
            "tokens_per_shard": 1024,
            "tokens_per_micro_batch": 512,
        },
        "clustering.num_experts": [6, 5, 4, 3, 2],
        "export.formats": ["tied"],
        "export.max_file_bytes": "1 GB",
        "evaluation": None,
    }
    run_file = write_run_file(folder, golden / NAME, golden / "calib_tokens.npy", settings)
    return {
        case: FinishedRun.of(run_file, [f"clustering.linkage={case[0]}", f"merging.method={METHODS[case[1]]}"])
        for case in CASES
    }


def close(ours: Any, theirs: Any) -> None:
    """1e-5 relative; where values cancel to almost nothing, relative to the largest."""
    theirs = np.asarray(theirs, dtype=np.float64)
    np.testing.assert_allclose(np.asarray(ours, dtype=np.float64), theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())


def partition(labels_E: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels_E == label).tolist()) for label in set(np.asarray(labels_E).tolist())}


def our_labels(done: FinishedRun, layer: int, num_experts: int) -> np.ndarray:
    return read_labels(labels_file(done.cluster_dir, layer), num_experts)


def target_cases(records: dict[str, Any]) -> Iterator[tuple[str, str, int, str]]:
    """Linkage, merge, experts and name of every merged model of the reference."""
    for linkage, merge in CASES:
        for num_experts in (6, 4, 2):
            name = record_name(linkage, merge, num_experts)
            if name in records:
                yield linkage, merge, num_experts, name


def matrices(done: FinishedRun, num_experts: int, layer: int, cluster: int) -> dict[str, np.ndarray]:
    """w1, w2, w3 of one merged expert as they lie on disk."""
    tensors = load_file(done.model(f"{num_experts}e-tied") / "model.safetensors")
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{cluster}"
    return {name: tensors[f"{prefix}.{name}.weight"].numpy() for name in ("w1", "w2", "w3")}


def test_the_reference_has_what_these_tests_compare(records: dict[str, Any]) -> None:
    names = {(linkage, merge) for linkage, merge, _, _ in target_cases(records)}
    assert names == {("average", "freq"), ("average", "weighted-avg"), ("single", "freq")}
    assert len(list(target_cases(records))) == 9


def test_mean_outputs_and_usage(golden_runs: dict[Any, FinishedRun], reference: dict[str, torch.Tensor]) -> None:
    done = golden_runs["average", "freq"]
    means_LED, usage_LE = reference[f"{NAME}/mean_out"], reference[f"{NAME}/usage"]
    for layer in range(4):
        statistics = read_evidence(done.calibrate_dir, layer)
        assert statistics.num_tokens == 16 * 128
        close(statistics["output_sum"] / statistics.num_tokens, means_LED[layer])
        close(statistics["num_routed_tokens"] / statistics["num_routed_tokens"].sum(), usage_LE[layer])


def test_partitions_at_every_target(golden_runs: dict[Any, FinishedRun], records: dict[str, Any]) -> None:
    for linkage, merge, num_experts, name in target_cases(records):
        for layer in range(4):
            theirs = partition(np.array(records[name]["labels"][layer]))
            assert partition(our_labels(golden_runs[linkage, merge], layer, num_experts)) == theirs, (name, layer)


def test_merged_weights_in_full(golden_runs: dict[Any, FinishedRun], reference: dict[str, torch.Tensor]) -> None:
    name = record_name("average", "freq", 4)
    labels_LE, usage_LE = reference[f"{name}/labels"].numpy(), reference[f"{NAME}/usage"].numpy()
    done, num_compared = golden_runs["average", "freq"], 0
    for key in (key for key in reference if key.startswith(f"{name}/merged/") and key.endswith("/w1")):
        layer, label = (int(part[1:]) for part in key.split("/")[-3:-1])
        members = np.flatnonzero(labels_LE[layer] == label)
        if usage_LE[layer][members].sum() == 0:
            continue
        (cluster,) = set(our_labels(done, layer, 4)[members].tolist())
        for matrix, ours in matrices(done, 4, layer, cluster).items():
            close(ours, reference[key.removesuffix("w1") + matrix])
            num_compared += 1
    assert num_compared >= 12


def test_fingerprints_of_merged_weights(
    golden_runs: dict[Any, FinishedRun], reference: dict[str, torch.Tensor], records: dict[str, Any]
) -> None:
    usage_LE = reference[f"{NAME}/usage"].numpy()
    for linkage, merge, num_experts, name in target_cases(records):
        labels_LE = reference[f"{name}/labels"].numpy()
        for layer in range(4):
            for label, theirs in enumerate(reference[f"{name}/fp/L{layer}"].numpy()):
                members = np.flatnonzero(labels_LE[layer] == label)
                if merge == "freq" and usage_LE[layer][members].sum() == 0:
                    continue
                done = golden_runs[linkage, merge]
                (cluster,) = set(our_labels(done, layer, num_experts)[members].tolist())
                found = matrices(done, num_experts, layer, cluster)
                for matrix, (total, norm, *entries) in zip(found.values(), theirs, strict=True):
                    flat = matrix.astype(np.float64).reshape(-1)
                    assert flat.sum() == pytest.approx(total, rel=1e-5, abs=1e-6 * np.abs(flat).sum())
                    assert np.linalg.norm(flat) == pytest.approx(norm, rel=1e-5)
                    picked = flat[np.linspace(0, len(flat) - 1, 8).astype(int)]
                    np.testing.assert_allclose(picked, entries, rtol=1e-5, atol=1e-6 * np.abs(flat).max())


def test_clusters_of_one_are_the_source_exactly(golden_runs: dict[Any, FinishedRun], golden: Path) -> None:
    source, num_alone = load_file(golden / NAME / "model.safetensors"), 0
    for done in golden_runs.values():
        for layer in range(4):
            labels_E = our_labels(done, layer, 6)
            for cluster in range(6):
                members = np.flatnonzero(labels_E == cluster)
                if len(members) == 1:
                    num_alone += 1
                    for name, ours in matrices(done, 6, layer, cluster).items():
                        theirs = source[f"model.layers.{layer}.block_sparse_moe.experts.{members[0]}.{name}.weight"].numpy()
                        assert ours.tobytes() == theirs.tobytes()
    assert num_alone >= 4 * 4


def test_tied_logits_and_loss_on_held_out_tokens(
    golden_runs: dict[Any, FinishedRun], reference: dict[str, torch.Tensor], records: dict[str, Any], golden: Path
) -> None:
    ids_ST = np.load(golden / "heldout_tokens.npy")
    for linkage, merge, num_experts, name in target_cases(records):
        model = load(golden_runs[linkage, merge].model(f"{num_experts}e-tied"), trust_remote_code=True)
        found = logits(model, ids_ST)
        theirs = reference[f"{name}/logits_last4"]
        # Their denominator has 1e-7 added to it, which scales each merged expert by up to 1 - 1e-6: compare with the largest.
        assert (found[:, -4:] - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name
        loss = torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), torch.from_numpy(ids_ST[:, 1:]).flatten())
        assert loss.item() == pytest.approx(records[name]["heldout_loss"], rel=1e-5)


def test_one_calibration_serves_every_linkage_and_method(golden_runs: dict[Any, FinishedRun]) -> None:
    assert len({done.calibrate_dir for done in golden_runs.values()}) == 1
    ran = [done.recorder.stages for done in golden_runs.values()]
    assert ["calibrate" in stages for stages in ran] == [True, False, False, False]
