"""The products that a GPU makes in one call are those that a CPU makes one by one."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from stages.calibrate import statistics
from stages.calibrate.products import can_group, gates_by_halves
from stages.calibrate.statistics import LayerStatistics
from stages.common.expert_weights import ExpertWeights
from tests.stages.test_mapped import calibrated, opened
from tests.stages.tiny import build, save
from tests.tiny import random_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_one_call_for_all_experts_gives_what_a_call_for_each_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    """gpt_oss has biases, and matrices to multiply with from the right; llama4_text calls expert by expert."""
    folder, ids = save(build(family, dtype), tmp_path / "model"), torch.from_numpy(random_ids())
    each, hidden_of_each = calibrated(opened(folder), ids)
    monkeypatch.setattr(statistics, "can_group", lambda weights: True)
    grouped, hidden = calibrated(opened(folder), ids)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(hidden, hidden_of_each, rtol=tolerance, atol=tolerance)
    first = min(each)  # later layers see hidden states that may differ by a rounding
    ours, theirs = (torch.from_numpy(watched[first].gated_output_norm_sum_E.numpy()) for watched in (grouped, each))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    assert torch.equal(grouped[first].num_routed_E, each[first].num_routed_E)
    assert torch.equal(grouped[first].activation_sum_EF, each[first].activation_sum_EF)


def weights_on(device: str, dtype: torch.dtype, intermediate: int) -> ExpertWeights:
    """Experts as far as the choice looks at them; no GPU is asked for."""
    down = MagicMock(shape=(4, 64, intermediate), dtype=dtype, device=torch.device(device))
    down.__len__.return_value = 4
    return ExpertWeights(SimpleNamespace(down_proj=down, is_transposed=False, has_bias=False, has_gate=True))


def test_only_a_gpu_groups_and_only_what_its_kernel_takes() -> None:
    assert can_group(weights_on("cuda", torch.bfloat16, 48))
    assert not can_group(weights_on("cpu", torch.bfloat16, 48))
    assert not can_group(weights_on("cuda", torch.float32, 48))
    assert not can_group(weights_on("cuda", torch.bfloat16, 44))


def test_only_the_usual_gate_is_made_in_place(tmp_path: Path) -> None:
    for family, is_usual in (("mixtral", True), ("gpt_oss", False)):
        held = opened(save(build(family, torch.float32), tmp_path / family))
        experts = held.shard.expert_weights(1).experts
        assert gates_by_halves(experts) == is_usual
        watched = LayerStatistics(1, ExpertWeights(experts), torch.nn.Identity(), "softmax")
        products = torch.randn(3, 5, 2 * watched.weights.intermediate)
        assert torch.equal(watched._activate(products.clone()), experts._apply_gate(products))
