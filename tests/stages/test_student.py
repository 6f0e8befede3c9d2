"""A layer whose experts are those of a plan: its router alone, and in the layer.

Dimensions: T tokens, D hidden size, k experts a token, E experts.
"""

import gc
from pathlib import Path
from weakref import ref

import pytest
import torch
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.contracts.layer_plan import LayerPlan, Member, RouterRow, Slot
from stages.model.families import SUPPORTED
from stages.model.layer_shard import LayerShard
from stages.model.survey import survey
from stages.recombine.steps.held import HeldLayer
from stages.recombine.student import Student
from tests.tiny import build, save

REFITTED = sorted(name for name, family in SUPPORTED.items() if not (family.normalises_outputs or family.gates_input))
Routed = tuple[Tensor, Tensor, Tensor]
"""Inputs of the experts [T, D], slots and gates [T, k]."""


@pytest.mark.parametrize("family", REFITTED)
def test_the_router_alone_gives_what_it_gives_in_the_layer(family: str, tmp_path: Path) -> None:
    """With the source's rows, and with a row a slot."""
    checkpoint = Checkpoint(save(build(family, torch.float32), tmp_path / "source"))
    layer = survey(checkpoint)[0].moe_layers[0]
    shard = LayerShard(checkpoint, 0, layer + 1, num_threads=1)
    num_experts = shard.expert_weights(layer).num_experts
    size = num_experts // 4
    for has_rows in (False, True):
        slots = []
        for first in range(0, num_experts, size):
            shares = tuple((expert, 1 / size) for expert in range(first, first + size))
            row = RouterRow(shares) if has_rows else None
            slots.append(Slot(tuple(expert for expert, _ in shares), tuple(Member(*share) for share in shares), row=row))
        plan = LayerPlan(layer, num_experts, tuple(slots))
        student = Student(shard, layer, plan)
        parts, shared = student.weights.experts, Student(shard, layer, plan, like=student).weights.experts
        assert [one.data_ptr() for one in parts.parameters()] == [one.data_ptr() for one in shared.parameters()], "no copies"
        torch.manual_seed(0)
        with torch.inference_mode():
            ids = torch.randint(0, 50, (2, 12))
            hidden_BTD = shard.embed(ids)
            due, found = list[Routed](), list[Routed]()

            def seen_in(kept: list[Routed], x_TD: Tensor, slots_Tk: Tensor, gates_Tk: Tensor) -> Tensor:
                kept.append((x_TD, slots_Tk, gates_Tk))
                return torch.zeros_like(x_TD)

            student.run(hidden_BTD, lambda *given, due=due: seen_in(due, *given))
            student.route(due[0][0], lambda *given, found=found: seen_in(found, *given))
        for one, other in zip(due[0], found[0], strict=True):
            torch.testing.assert_close(one, other)


def test_a_worker_holds_the_experts_of_one_plan_at_a_time(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(build("mixtral", torch.float32), tmp_path / "source"))
    shard = HeldLayer(checkpoint, 0, 1, num_threads=1)
    plan = LayerPlan(0, 8, tuple(Slot((first, first + 4), (Member(first, 0.5), Member(first + 4, 0.5))) for first in range(4)))
    held = ref(shard.planned(tmp_path, "planned", plan))
    assert shard.planned(tmp_path, "planned", plan) is held()
    shard.planned(tmp_path, "other", plan)
    gc.collect()
    assert held() is None
