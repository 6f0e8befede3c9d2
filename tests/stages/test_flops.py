"""A calibrate unit does the arithmetic that its algorithm needs and no more: counted, not timed.

Dimensions: T tokens, D hidden size, F intermediate size, E experts, k experts a token.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.calibrate.cells import ALL_TOKENS, Sample
from stages.calibrate.spec import CalibrationShardArgs, flops_a_token
from stages.calibrate.units import CalibrationShard, open_shard
from stages.calibrate.watcher import Watcher
from stages.contracts.text_settings import Calibration
from stages.model import experts_forward
from stages.model.expert_weights import ExpertWeights
from stages.model.experts_forward import Blocks
from stages.model.stream import Stream, pass_through
from stages.model.survey import survey_checkpoint
from tests.tiny import FAMILIES, random_ids


def count(held: CalibrationShard, ids: torch.Tensor, is_watched: bool) -> int:
    """Operations of all matrix products of a token shard's way through the layers."""
    watched: dict[int, Watcher] = {}
    with FlopCounterMode(display=False) as counter:
        stream = Stream(around=lambda layer: held.watch(layer, watched)) if is_watched else Stream()
        pass_through(held.shard, ids, 2, {"model": stream})
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_meet_all_tokens_once_and_w_down_the_routed_ones(
    family: str, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rows of padding, which depend on the routing."""
    monkeypatch.setattr(experts_forward, "padded", lambda num_rows, device: num_rows)
    folder = tiny_checkpoint(family)
    survey, _ = survey_checkpoint(str(folder))
    held = open_shard(CalibrationShardArgs(str(folder), 0, survey.num_layers, 1, survey.routers))
    ids = torch.from_numpy(random_ids())
    ours = count(held, ids, is_watched=True)
    due = 0
    for experts in held.shard.adapted.experts_modules().values():
        num_experts, hidden_size, intermediate = experts.down_proj.shape
        first = 2 * num_experts * 2 * intermediate * hidden_size
        routed = 2 * survey.top_k * intermediate * hidden_size
        gram = 2 * num_experts**2
        due += ids.numel() * (first + routed + gram)
        monkeypatch.setattr(experts, "forward", lambda hidden, *_: torch.zeros_like(hidden))
    rest = count(held, ids, is_watched=False)
    assert rest > 0
    assert ours == rest + due


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fraction", [None, 0.25])
def test_plan_states_the_operations_of_a_token(
    family: str, fraction: float | None, tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but attention's scores, which torch's counter leaves out, too, and the Gram matrix of the router's logits."""
    monkeypatch.setattr(experts_forward, "padded", lambda num_rows, device: num_rows)
    folder = tiny_checkpoint(family)
    survey, _ = survey_checkpoint(str(folder))
    held = open_shard(CalibrationShardArgs(str(folder), 0, survey.num_layers, 1, survey.routers))
    ids = torch.from_numpy(random_ids())
    sampling = None if fraction is None else {"fraction": fraction, "groups": 2}
    data = Calibration(data=("x",), num_sequences=len(ids), sequence_length=ids.shape[1], sampling=sampling)
    sample = Sample(fraction, 2, *ids.shape, 0, 0) if fraction is not None else ALL_TOKENS
    watched: dict[int, Watcher] = {}
    with FlopCounterMode(display=False) as counter:
        stream = Stream(around=lambda layer: held.watch(layer, watched, sample))
        pass_through(held.shard, ids, 2, {"model": stream})
    gram = 2 * survey.num_experts**2 * ids.numel() * len(survey.moe_layers)
    counted = counter.get_total_flops() - gram
    assert flops_a_token(survey, data) * ids.numel() == pytest.approx(counted, rel=0.02)


def weights_of(num_experts: int, intermediate: int, hidden: int) -> ExpertWeights:
    """Experts in bfloat16 without values, as most families have them."""
    first = torch.empty(num_experts, 2 * intermediate, hidden, dtype=torch.bfloat16)
    down = torch.empty(num_experts, hidden, intermediate, dtype=torch.bfloat16)
    flags = {"is_transposed": False, "has_bias": False, "has_gate": True}
    return ExpertWeights(SimpleNamespace(gate_up_proj=first, down_proj=down, **flags))


def test_the_cut_follows_from_shapes() -> None:
    """Small experts are multiplied together; a chunk of wide ones is never shorter than a product needs."""
    assert Blocks.of(weights_of(num_experts=64, intermediate=192, hidden=512)) == Blocks(num_tokens=512, num_experts=5)
    assert Blocks.of(weights_of(num_experts=8, intermediate=14336, hidden=8)) == Blocks(num_tokens=512, num_experts=1)
