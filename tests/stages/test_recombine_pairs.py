"""Pairs by elimination, the shared expert in the refit, and the best of several plans.

Dimensions: T tokens, D hidden size, E experts, F neurons of an expert.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.layer_plan import LayerPlan, Member, Slot, read_plan
from stages.model.experts_forward import ExpertsForward
from stages.model.layer_shard import LayerShard
from stages.recombine import neurons, pairs
from stages.recombine.pairing import MOST_OPERATIONS, pair_operations
from stages.recombine.pairs import GroupLosses, Routed, paired_plan
from stages.recombine.router import Router
from stages.recombine.router_step import moved, slopes
from stages.recombine.shared import SharedExpert
from stages.recombine.solve import Problem, SlotTokens, error_of_start
from tests.runs import run_all, tensor_bytes, token_ids
from tests.tiny import build, load, logits, save

NUM_TOKENS, HIDDEN, NEURONS, EXPERTS = 300, 4, 3, 6


class Experts:
    """Experts of random activations, [E, T, F], and W_down, [E, D, F]. The first number of an input [T, D] is its token."""

    def __init__(self, a_ETF: Tensor, down_EDF: Tensor) -> None:
        self.a_ETF, self.down_EDF = a_ETF, down_EDF

    def activations_of(self, x_TD: Tensor, tokens_R: Tensor, expert: int) -> Tensor:
        return self.a_ETF[expert, x_TD[tokens_R, 0].long()]

    def outputs_from(self, a_RF: Tensor, expert: int) -> Tensor:
        return a_RF @ self.down_EDF[expert].T

    def losses(self, routed: Routed, known: dict[tuple[int, ...], float] | None = None) -> GroupLosses:
        return GroupLosses(cast(ExpertsForward, self), routed, "layer 0", EXPERTS - 1, known or {})


def experts_of(seed: int = 0) -> tuple[Experts, Routed]:
    torch.manual_seed(seed)
    gate_TE = torch.rand(NUM_TOKENS, EXPERTS) * (torch.rand(NUM_TOKENS, EXPERTS) < 0.4)
    a_ETF, down_EDF = torch.randn(EXPERTS, NUM_TOKENS, NEURONS), torch.randn(EXPERTS, HIDDEN, NEURONS)
    x_TD = torch.cat([torch.arange(NUM_TOKENS)[:, None], torch.randn(NUM_TOKENS, HIDDEN - 1)], dim=1)
    return Experts(a_ETF, down_EDF), Routed(x_TD, gate_TE, torch.rand(NUM_TOKENS) + 0.5)


@pytest.mark.parametrize("group", [[0, 1], [5, 2], [1, 3, 4]])
def test_the_loss_of_a_group_is_the_error_without_its_least_neurons(group: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One neuron at a time, against least squares of every choice; all tokens, gates as a sum."""
    monkeypatch.setattr(neurons, "RIDGE", 1e-9)
    monkeypatch.setattr(pairs, "SHARE", 1e-9)
    experts, routed = experts_of()
    gate_TE, weight_T = routed.gate_NE.double().numpy(), routed.weight_N.double().numpy()
    a_ETF, down_EDF = experts.a_ETF.double().numpy(), experts.down_EDF.double().numpy()
    target = weight_T[:, None] * sum(gate_TE[:, [e]] * (a_ETF[e] @ down_EDF[e].T) for e in group)
    gate_T = gate_TE[:, group].sum(1) * weight_T
    columns = np.concatenate([gate_T[:, None] * a_ETF[e] for e in sorted(group)], axis=1)

    def error(left: Sequence[int]) -> float:
        return float(np.linalg.lstsq(columns[:, left], target, rcond=None)[1].sum())

    left = list(range(columns.shape[1]))
    while len(left) > NEURONS:
        left.remove(min(left, key=lambda gone: error([one for one in left if one != gone])))
    assert experts.losses(routed)(group) == pytest.approx(error(left), rel=1e-4)
    assert experts.losses(routed)([group[0]]) == 0


def test_of_many_neurons_evenly_spaced_ones_stand_for_all_and_pairs_together_lose_what_they_lose_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pairs, "COMPARED", 2)
    experts, routed = experts_of()
    fewer = Experts(experts.a_ETF[:, :, [0, 2]], experts.down_EDF[:, :, [0, 2]])
    found = experts.losses(routed).of_pairs(1, [0, 3, 5])
    assert found == pytest.approx([fewer.losses(routed)(group) for group in ([0, 1], [1, 3], [1, 5])], rel=1e-5)
    assert len(set(found)) == 3 and experts.losses(routed).of_pairs(5, []) == []


def test_of_many_partners_the_best_of_a_first_look_are_compared_and_the_rest_are_taken_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts, routed = experts_of()
    look = Experts(experts.a_ETF[:, :, [0, 2]], experts.down_EDF[:, ::2, [0, 2]])
    others = [0, 1, 3, 4, 5]
    looks = {other: look.losses(routed)([2, other]) for other in others}
    whole = {other: experts.losses(routed)([2, other]) for other in others}
    looks_of_more = look.losses(routed)([0, 1, 2, 4])
    monkeypatch.setattr(pairs, "NEAR", 2)
    monkeypatch.setattr(pairs, "LOOK", 2)
    assert experts.losses(routed).of_pairs(2, others) == pytest.approx(list(whole.values()), rel=1e-5)
    monkeypatch.setattr(pairs, "FEW", EXPERTS - 2)
    near = sorted(others, key=lambda other: looks[other])[:2]
    factor = max(whole[other] / looks[other] for other in near)
    due = [whole[other] if other in near else looks[other] * factor for other in others]
    assert experts.losses(routed).of_pairs(2, others) == pytest.approx(due, rel=1e-5)
    assert len(set(due)) == 5
    assert experts.losses(routed).of_pairs(2, [3, 5]) == pytest.approx([whole[3], whole[5]], rel=1e-5)
    known = {(0, 1): 3.0, (1, 2): 40.0, (2, 3): 5.0, (2, 4): 60.0}
    scale = 8 / (look.losses(routed)([0, 1]) + looks[3])
    assert experts.losses(routed, known)([4, 0, 1, 2]) == pytest.approx(looks_of_more * scale, rel=1e-5)


def test_experts_with_the_same_neurons_in_another_order_lose_nothing_and_become_pairs() -> None:
    """Three experts and their permuted copies; what is paired keeps its members in proportion to their use."""
    experts, routed = experts_of(1)
    for one in range(3):
        experts.a_ETF[one + 3] = experts.a_ETF[one][:, [2, 0, 1]]
        experts.down_EDF[one + 3] = experts.down_EDF[one][:, [2, 0, 1]]
    losses = experts.losses(routed)
    total = float(routed.gate_NE.square().sum())
    assert all(losses([one, one + 3]) < 1e-3 * total for one in range(3))
    assert all(losses([one, other]) > 0.1 * total for one in range(3) for other in range(6) if other not in (one, one + 3))
    start = LayerPlan(0, EXPERTS, tuple(Slot((one, one + 1), (Member(one), Member(one + 1))) for one in (0, 2, 4)))
    used_E = torch.arange(1, EXPERTS + 1)
    found = paired_plan(start, losses, used_E, 1)
    assert [slot.experts for slot in found.slots] == [(0, 3), (1, 4), (2, 5)]
    assert [member.weight for member in found.slots[1].members] == [2 / 7, 5 / 7]
    assert {frozenset(slot.experts) for slot in paired_plan(start, losses, used_E, 3).slots} == {
        frozenset((one, one + 1)) for one in (0, 2, 4)
    }, "two of each group of a router"


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_gate_of_a_pair_is_that_of_the_row_that_it_gets(score: str) -> None:
    """Token by token: a row by ridge regression, its probability, and whether it comes before the source's last pick."""
    torch.manual_seed(2)
    x_TD = torch.randn(NUM_TOKENS, HIDDEN)
    logit_TE = x_TD @ torch.randn(HIDDEN, EXPERTS)
    probability_TE = (logit_TE.softmax(1) if score == "softmax" else torch.sigmoid(logit_TE)).double().numpy()
    picked = np.argsort(-probability_TE, axis=1)[:, :2]
    gate_TE = np.zeros_like(probability_TE)
    for token, some in enumerate(picked):
        gate_TE[token, some] = 2.5 * probability_TE[token, some] / probability_TE[token, some].sum()
    routed = Routed(x_TD, torch.tensor(gate_TE).float(), torch.ones(NUM_TOKENS), score, logit_TE, x_TD)
    found_T, single_T = routed.slot_gates()([[1, 4], [3]]).T
    x, logits_ = x_TD.double().numpy(), logit_TE.double().numpy()
    if score == "softmax":
        due = np.log(np.exp(logits_[:, [1, 4]]).sum(1)) - logits_.mean(1)
    else:
        either = 1 - np.prod(1 - probability_TE[:, [1, 4]], axis=1)
        due = np.log(either / (1 - either))
    gram = x.T @ x
    row = np.linalg.solve(gram + 1e-3 * np.diag(gram).mean() * np.eye(HIDDEN), x.T @ due)
    used = 0
    for token in range(NUM_TOKENS):
        logit = x[token] @ row + (logits_[token].mean() if score == "softmax" else 0)
        p = np.exp(logit) / np.exp(logits_[token]).sum() if score == "softmax" else 1 / (1 + np.exp(-logit))
        last = probability_TE[token, picked[token, 1]]
        is_used = p >= last
        used += is_used
        expected = p * 2.5 / probability_TE[token, picked[token]].sum() if is_used else 0
        assert float(found_T[token]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 50 < used < 250
    assert torch.equal(single_T, routed.gate_NE[:, 3])


def test_auto_takes_elimination_up_to_a_bound() -> None:
    """Qwen3-30B's 128 experts of 768 neurons, but neither Mixtral's 8 of 14,336 nor DeepSeek-V3's 256 of 2,048."""
    assert pair_operations(128, 768) < MOST_OPERATIONS
    assert min(pair_operations(8, 14336), pair_operations(256, 2048)) > MOST_OPERATIONS


def test_elimination_without_neurons_to_choose_is_refused_in_one_line(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    for changes, reason in (
        ({"refit": {"neurons": "keep"}}, r"refit\.neurons is not choose"),
        ({"merging": {"method": "average"}}, r"merging\.method is average"),
        ({"export": {"router": "saliency"}}, r"export\.router is saliency"),
    ):
        variant = {"name": "a", "preset": "recombine", "clustering": {"pair_cost": "elimination"}, **changes}
        with pytest.raises(InputError, match=rf"pair_cost is elimination, but {reason}.*; set pair_cost to auto"):
            run_all(source, tmp_path / "run", path, [4], ["stock"], variants=[variant])


def gate_of(block: nn.Module, x_TD: Tensor) -> Tensor:
    gate = getattr(block, "shared_expert_gate", None)
    return torch.ones(len(x_TD)) if gate is None else torch.sigmoid(gate(x_TD))[:, 0]


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "nemotron_h"])
def test_a_shared_expert_and_its_gates_are_found(family: str, tmp_path: Path) -> None:
    """Its gates times its W_down times its activations are what the block adds beside its experts."""
    source = save(build(family, torch.float32), tmp_path / "source")
    shard = LayerShard(Checkpoint(source), 0, 3, 1)
    layer, experts = min(shard.adapted.experts_modules().items())
    shared = SharedExpert.of(shard.adapted.layers[layer], experts)
    assert shared is not None
    x_TD = torch.randn(20, shard.adapted.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        gate_T = shared.gates(x_TD)
        assert gate_T is not None
        torch.testing.assert_close(gate_T, gate_of(shared.block, x_TD))
        torch.testing.assert_close(shared.activations(x_TD) @ shared.weight_DF.T, shared.mlp(x_TD))
        plain = shared.block(x_TD[None])[0]
        shared.down_DF = 2 * shared.down.weight
        with shared.stands_in():
            added = shared.block(x_TD[None])[0] - plain
        torch.testing.assert_close(added, gate_T[:, None] * shared.mlp(x_TD), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shared.block(x_TD[None])[0], plain)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_refit_with_the_shared_expert_leaves_less(family: str, tmp_path: Path) -> None:
    source = save(build(family, torch.float32), tmp_path / "source")
    path, ids = token_ids(tmp_path)
    due, formats = logits(load(source), ids), ["tied", "stock"]
    made = {
        has_shared: run_all(
            source, tmp_path / str(has_shared), path, [4], formats,
            refit={"mode": "sequential", "ridge": 1e-3, "shared_expert": has_shared},
        )
        for has_shared in (False, True)
    }  # fmt: skip
    for target in made[True]:
        plain, refitted = (tensor_bytes(made[has_shared][target]) for has_shared in (False, True))
        changed = {name for name in plain if plain[name] != refitted[name]}
        assert any("shared" in name for name in changed)
        assert all(name.endswith("down_proj.weight") for name in changed), changed
        errors = [(logits(load(one[target], trust_remote_code=True), ids) - due).norm() for one in made.values()]
        assert errors[1] < errors[0], target


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("is_normalised", [True, False])
def test_slopes_are_the_derivatives_of_the_output(score: str, is_normalised: bool) -> None:
    """By central differences, in float64, for the picks as they are."""
    torch.manual_seed(4)
    logit_BS, output_BSD = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, 3, dtype=torch.float64)
    is_picked_BS = torch.zeros(5, 4, dtype=torch.bool).scatter_(1, logit_BS.topk(2).indices, True)

    def gates(logit_BS: Tensor) -> Tensor:
        score_BS = logit_BS.softmax(1) if score == "softmax" else torch.sigmoid(logit_BS)
        picked_BS = score_BS * is_picked_BS
        return 1.5 * (picked_BS / picked_BS.sum(1, keepdim=True) if is_normalised else picked_BS)

    found_BSD = slopes(score, gates(logit_BS), logit_BS, output_BSD, is_normalised)
    for slot in range(4):
        change_BS = torch.zeros_like(logit_BS)
        change_BS[:, slot] = 1e-6
        ends = [(gates(logit_BS + sign * change_BS)[:, :, None] * output_BSD).sum(1) for sign in (1, -1)]
        torch.testing.assert_close(found_BSD[:, slot], (ends[0] - ends[1]) / 2e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_step_of_the_router_finds_rows_that_give_the_target(has_bias: bool) -> None:
    """Rows that are slightly off; W_down is right. A step leaves a small part of the error."""
    torch.manual_seed(5)
    x_TD, a_STF, down_SDF = torch.randn(400, 4), torch.randn(3, 400, 5), torch.randn(3, 6, 5)
    true = Router(("w", "b")[: 1 + has_bias], torch.randn(3, 4), torch.randn(3) if has_bias else None)
    off = Router(true.names, true.weight + 0.1 * torch.randn(3, 4), None if true.bias is None else true.bias + 0.1)

    def problem_of(router: Router) -> Problem:
        gate_TS = router.logits(x_TD).softmax(1)
        target_TD = torch.einsum("ts,sdf,stf->td", true.logits(x_TD).softmax(1), down_SDF, a_STF)
        slots = [SlotTokens(torch.arange(400), gate_TS[:, slot]) for slot in range(3)]
        return Problem(slots, lambda n, tokens: a_STF[n, tokens], target_TD, torch.ones(400), list(down_SDF), "here", [10] * 40)

    rows = moved("softmax", problem_of(off), None, off, x_TD, off.logits(x_TD))
    found = Router(true.names, rows["w"], rows.get("b"))
    errors = [error_of_start(problem_of(router)) for router in (off, found)]
    assert errors[1] < 0.05 * errors[0], errors


CANDIDATES = {"planned": "recombine", "clusters": "hc-recombine", "survivors": "reap-recombine", "pruned": "reap-refit"}


def folder_of(run_dir: Path, target: str) -> Path:
    (found,) = run_dir.glob(f"recombine-{target}-*")
    return found


def test_best_takes_in_each_layer_the_plan_with_the_least_error_on_held_text(tmp_path: Path) -> None:
    """The first layer is that of the preset that it takes; the report names it, and the errors of all."""
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    path, ids = token_ids(tmp_path)
    names = ["best", *CANDIDATES.values()]
    fixed = {"refit": {"ridge": 1e-3}, "export": {"router": "fitted"}}  # as best has it
    variants = [{"name": name, "preset": name, **fixed} for name in names]
    exports = run_all(source, tmp_path / "run", path, [4], ["stock"], variants=variants)
    best = folder_of(tmp_path / "run", "best-4e-stock")
    facts = [json.loads(one.read_text())["facts"] for one in sorted((best / "manifests").glob("layer-????.json"))]
    for one in facts:
        errors = dict(one["compared"])
        assert list(errors) == list(CANDIDATES) and one["chosen"] == min(errors, key=lambda name: errors[name])
        assert len(set(errors.values())) == len(errors)
    same = folder_of(tmp_path / "run", f"{CANDIDATES[facts[0]['chosen']]}-4e-stock")
    ours, theirs = (load_file(folder / "layer-0000.replaced.safetensors") for folder in (best, same))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_plan(best / "layer-0000.plan.arrow") == read_plan(same / "layer-0000.plan.arrow")
    assert torch.isfinite(logits(load(exports["best-4e-stock"]), ids)).all()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (row,) = (model for model in report["models"] if model.get("variant") == "best")
    assert [row["compared_plans"][str(one["layer"])] for one in facts] == [
        {"chosen": one["chosen"], "errors": dict(one["compared"])} for one in facts
    ]
