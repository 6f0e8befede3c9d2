"""The products that a GPU makes in one call are those that a CPU makes one by one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.calibrate.cells import ALL_TOKENS, Sample
from stages.calibrate.watcher import Watcher
from stages.model import experts_forward
from stages.model.expert_weights import ExpertWeights
from stages.model.experts_forward import ExpertsForward
from stages.model.products import can_group, gates_by_halves, padded, room_for
from stages.model.stream import Stream, pass_through
from tests.stages.test_mapped import calibrated, opened
from tests.tiny import build, random_ids, save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text"])
def test_one_call_for_all_experts_gives_what_a_call_for_each_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
) -> None:
    """gpt_oss has biases, and matrices to multiply with from the right; llama4_text calls expert by expert."""
    folder, ids = save(build(family, dtype), tmp_path / "model"), torch.from_numpy(random_ids())
    each, hidden_of_each = calibrated(opened(folder), ids)
    monkeypatch.setattr(experts_forward, "can_group", lambda weights: True)
    grouped, hidden = calibrated(opened(folder), ids)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(hidden, hidden_of_each, rtol=tolerance, atol=tolerance)
    first = min(each)  # later layers see hidden states that may differ by a rounding
    ours, theirs = grouped[first].sums, each[first].sums
    norms = (one["gated_output_norm"]["gated_output_norm_sum"] for one in (ours, theirs))
    torch.testing.assert_close(*(values_E.clone() for values_E in norms), rtol=tolerance, atol=0)
    for collector, name in (("usage", "num_routed_tokens"), ("output_sum", "activation_sum")):
        assert torch.equal(ours[collector][name], theirs[collector][name])


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
        forward = ExpertsForward(ExpertWeights(experts))
        products = torch.randn(3, 5, 2 * forward.weights.intermediate)
        assert torch.equal(forward.activate(products.clone()), experts._apply_gate(products))


CPU = torch.device("cpu")


def test_few_numbers_of_rows_are_left_and_little_is_added() -> None:
    assert [padded(n, CPU) for n in (0, 1, 64, 65, 1023, 1024, 1025, 2048, 2049)] == [
        0, 64, 64, 128, 1024, 1024, 1152, 2048, 2304,
    ]  # fmt: skip
    assert all(n <= padded(n, CPU) <= max(n + 63, n * 9 / 8) for n in range(20_000))
    assert len({padded(n, CPU) for n in range(16_385)}) == 49
    assert padded(65, torch.device("cuda")) == 65


def test_there_is_room_for_the_expert_that_reaches_furthest() -> None:
    assert room_for([0, 63, 63, 65], CPU) == 63 + 64
    assert room_for([0, 65, 66], CPU) == 65 + 64
    assert room_for([0, 129, 129], CPU) == 192
    assert room_for([0, 0], CPU) == 0


class Rows(TorchDispatchMode):
    """Numbers of rows that products ran over."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm"):
            self.seen.add(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_sampled", [False, True], ids=["all tokens", "sampled"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_more_tokens_bring_no_new_numbers_of_rows(tmp_path: Path, family: str, is_sampled: bool) -> None:
    """A worker's memory does not grow with them, then: oneDNN keeps a kernel for each. Padding changes roundings only."""
    held = opened(save(build(family, torch.float32), tmp_path / "model"))
    ids = torch.from_numpy(random_ids(num_sequences=64, sequence_length=32))
    cells = Sample(0.25, 2, 64, 32, 0, 0) if is_sampled else ALL_TOKENS

    def run() -> tuple[set[int], dict[int, Watcher]]:
        watched: dict[int, Watcher] = {}
        with Rows() as rows:
            pass_through(held.shard, ids, 8, {"model": Stream(around=lambda layer: held.watch(layer, watched, cells))})
        return rows.seen, watched

    seen, watched = run()
    sampled = {8 * number for number in range(1, 9)} if is_sampled else set()
    assert {rows for rows in seen if rows > 64} <= {128, 192, 256}
    assert seen - {rows for rows in seen if rows > 64} - sampled <= {0, 8, 64}, "8: a token of each sequence"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_forward, "padded", lambda num_rows, device: num_rows)
        unpadded_seen, unpadded = run()
    assert len(unpadded_seen) > len(seen) + 10
    for layer, one in watched.items():
        ours, theirs = one.result(), unpadded[layer].result()
        assert ours.num_tokens == theirs.num_tokens
        assert ours.num_unrouted_C.tolist() == theirs.num_unrouted_C.tolist()
        assert ours.sums["usage"]["num_routed_tokens"].tolist() == theirs.sums["usage"]["num_routed_tokens"].tolist()
        for name, sums in theirs.sums.items():
            for key, values in sums.items():
                atol = 1e-5 * np.abs(values).max()
                np.testing.assert_allclose(ours.sums[name][key], values, rtol=1e-5, atol=atol, err_msg=key)
