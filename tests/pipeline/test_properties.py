"""What holds for every preset and every collector that there is, through the pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.commands.run import run
from pipeline.config import load_config
from pipeline.driver.run_state import RunOptions
from pipeline.executors.local import LocalExecutor
from pipeline.run.variants import presets
from stages.calibrate.collectors.registry import DEFAULT_COLUMNS, FURTHER
from stages.contracts.evidence import LayerEvidence, read_evidence
from tests.runs import FinishedRun, Recorder, digests, tensor_bytes, write_run_file
from tests.tiny import FAMILIES

GATHERING: list[dict[str, Any]] = [
    {"name": "token-wise", "preset": "zipit", "clustering": {"feature": "token_wise"}},
    {"name": "weight", "clustering": {"feature": "weight", "protect": "super"}},
    {"name": "gated", "preset": "ream"},
    {"name": "pairs", "clustering": {"method": "pairs"}},
    {"name": "ean", "preset": "ean"},
    {"name": "o-prune", "preset": "o-prune"},
]
"""Variants that need all collectors between them."""


def test_every_preset_with_all_experts_is_the_source_byte_for_byte(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path
) -> None:
    source, count = tiny_checkpoint("mixtral"), FAMILIES["mixtral"].num_experts
    settings = {"clustering.num_experts": [count], "variants": sorted(presets()), "evaluation": None}
    done = FinishedRun.of(write_run_file(tmp_path, source, token_ids, settings))
    due = tensor_bytes(source)
    assert {target.variant.name for target in done.view.targets} == set(presets())
    for target in done.view.targets:
        found = tensor_bytes(done.model(target.part))
        assert {name: value for name, value in found.items() if not name.endswith("expert_map")} == due, target.name


@pytest.fixture(scope="module")
def evidence_from(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path], token_ids: Path
) -> Callable[..., tuple[dict[str, str], dict[int, LayerEvidence]]]:
    """Digests of all evidence of a calibration with every collector, and the evidence of each layer."""

    def calibrated(**settings: Any) -> tuple[dict[str, str], dict[int, LayerEvidence]]:
        folder = tmp_path_factory.mktemp("evidence")
        common = {"variants": GATHERING, "evaluation": None, "calibration.tokens_per_micro_batch": 64}
        path = write_run_file(folder, tiny_checkpoint("mixtral"), token_ids, {**common, **settings})
        for stage in ("prepare", "calibrate"):
            run(load_config(path, []), LocalExecutor, Recorder(), RunOptions(only_stage=stage))
        (calibrate_dir,) = (folder / "run").glob("calibrate-*")
        columns = [column.name for one in FURTHER.values() for column in one.columns]
        return digests(calibrate_dir, "*.arrow"), {layer: read_evidence(calibrate_dir, layer, columns) for layer in range(3)}

    return calibrated


def test_evidence_of_every_collector_has_the_same_bytes_from_any_layer_shards(evidence_from: Callable[..., Any]) -> None:
    """As many workers hold them: each is given units by layer shard."""
    (one, _), (three, _) = (evidence_from(**{"resources.layers_per_shard": count}) for count in (1, 3))
    assert one == three
    assert len(one) == 3 * (1 + sum(len(collector.columns) for collector in FURTHER.values()))


def test_evidence_of_every_collector_is_the_same_from_any_token_shards(evidence_from: Callable[..., Any]) -> None:
    """Up to the order of float64 sums; counts, maxima and what is kept of single tokens bit for bit."""
    (_, one), (_, four) = (evidence_from(**{"calibration.tokens_per_shard": tokens}) for tokens in (256, 64))
    for layer, evidence in one.items():
        assert evidence.columns.keys() >= {column.name for column in DEFAULT_COLUMNS}
        for name, values in evidence.columns.items():
            np.testing.assert_allclose(four[layer][name], values, rtol=1e-12, atol=1e-12 * np.abs(values).max(), err_msg=name)
        for name in ("num_routed_tokens", "largest_down_output", "neuron_activations", "sampled_output_gram", "weight_gram"):
            assert np.array_equal(four[layer][name], evidence[name]), name
