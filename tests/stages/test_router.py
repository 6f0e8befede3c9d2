"""Rows of a stock router, against slow references from their formulas, and in checkpoints.

Dimensions: T tokens, D hidden size, E experts of the source, S slots.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.contracts.errors import InputError
from stages.recombine import router as fitting
from stages.recombine.router import Router, fitted, sigmoid_target, softmax_target
from tests.runs import read_tensors, run_all, token_ids
from tests.tiny import build, load, logits, save

GROUPS = [(0, 3), (1,), (2, 4, 5)]
TOKENS, HIDDEN, EXPERTS = 50, 7, 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_softmax_over_slots_gives_each_the_sum_of_its_members() -> None:
    logits_TE = drawn(TOKENS, EXPERTS)
    found_TS = softmax_target(logits_TE, GROUPS).softmax(1)
    for token in range(TOKENS):
        exps = [math.exp(value) for value in logits_TE[token].tolist()]
        due = [sum(exps[expert] for expert in group) / sum(exps) for group in GROUPS]
        assert found_TS[token].tolist() == pytest.approx(due)


def test_a_sigmoid_gives_a_slot_the_probability_that_any_member_fires() -> None:
    logits_TE = drawn(TOKENS, EXPERTS) * 4
    logits_TE[0, :] = -80.0
    found_TS = sigmoid_target(logits_TE, GROUPS)
    for token in range(1, TOKENS):
        quiet = [1 / (1 + math.exp(value)) for value in logits_TE[token].tolist()]
        due = [1 - math.prod(quiet[expert] for expert in group) for group in GROUPS]
        assert found_TS[token].sigmoid().tolist() == pytest.approx(due)
    torch.testing.assert_close(found_TS[:, 1], logits_TE[:, 1])
    assert found_TS[0].tolist() == pytest.approx([-80 + math.log(len(group)) for group in GROUPS])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_are_the_ridge_solution(score: str, has_bias: bool) -> None:
    x_TD, source_ED, start_SD = drawn(TOKENS, HIDDEN), drawn(EXPERTS, HIDDEN, seed=1), drawn(3, HIDDEN, seed=2)
    bias_E, bias_S = (drawn(EXPERTS, seed=3), drawn(3, seed=4)) if has_bias else (None, None)
    source, start = Router(("w", "b"), source_ED, bias_E), Router(("w", "b")[: 1 + has_bias], start_SD, bias_S)
    found = fitted(score, source, start, x_TD, GROUPS)
    target_TS = fitting.TARGETS[score](source.logits(x_TD).double(), GROUPS).numpy()
    columns, pulled = x_TD.numpy(), start_SD.numpy()
    if has_bias:
        columns = np.concatenate([columns, np.ones((TOKENS, 1))], axis=1)
        pulled = np.concatenate([pulled, bias_S.numpy()[:, None]], axis=1)
    if score == "softmax":
        pulled = pulled - pulled.mean(0)
    pull = np.sqrt(1e-3 * np.square(columns).sum(0).mean())
    rows = np.concatenate([columns, pull * np.eye(columns.shape[1])])
    due = np.linalg.lstsq(rows, np.concatenate([target_TS, pull * pulled.T]), rcond=None)[0].T
    np.testing.assert_allclose(found["w"], due[:, :HIDDEN], atol=1e-5)
    if has_bias:
        np.testing.assert_allclose(found["b"], due[:, HIDDEN], atol=1e-5)


def facts(run_dir: Path) -> list[dict[str, Any]]:
    (folder,) = run_dir.glob("recombine-4e-stock-*")
    return [json.loads(path.read_text())["facts"] for path in sorted((folder / "manifests").glob("layer-*.json"))]


@pytest.mark.parametrize(
    ("family", "is_chosen"),
    {"mixtral": True, "ernie4_5_moe": True, "deepseek_v3": True, "gpt_oss": False, "phimoe": False}.items(),
)
def test_a_fitted_router_is_written_where_it_leaves_less(family: str, is_chosen: bool, tmp_path: Path) -> None:
    """Random routers, made sharp: softmax, sigmoid, with a bias, with a correction bias. is_chosen: in a layer at least."""
    model = build(family, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.shape == (8, 32) and not name.endswith("bias"):
                parameter *= 20
    source = save(model, tmp_path / "source")
    ids_ST = np.random.default_rng(1).integers(3, 128, (24, 48))
    np.save(path := tmp_path / "ids.npy", ids_ST)
    changes: dict[str, Any] = {
        "calibration": {"data": str(path), "num_sequences": 24, "sequence_length": 48},
        "refit": {"mode": "sequential", "ridge": 1e-3},
    }
    exports = {
        router: run_all(source, tmp_path / router, path, [4], ["stock"], export={"router": router}, **changes)["4e-stock"]
        for router in ("frequency", "fitted")
    }
    found = {router: facts(tmp_path / router) for router in exports}
    assert not any(layer["is_router_fitted"] for layer in found["frequency"])
    fitted_layers = {layer["layer"] for layer in found["fitted"] if layer["is_router_fitted"]}
    assert fitted_layers or not is_chosen
    assert torch.isfinite(logits(load(exports["fitted"]), ids_ST[:2])).all()
    rule, fit = (read_tensors(exports[router]) for router in ("frequency", "fitted"))
    rows = [name for name in rule if rule[name].shape == (4, 32) and "expert" not in name]
    assert len(rows) == len(found["fitted"])
    changed = {int(name.split("layers.")[1].split(".")[0]) for name in rows if not torch.equal(rule[name], fit[name])}
    assert changed == fitted_layers


def test_a_fitted_router_needs_a_refit(tmp_path: Path) -> None:
    path, _ = token_ids(tmp_path)
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    with pytest.raises(InputError, match=r"export\.router is fitted, but nothing is refitted; set refit\.mode to sequential"):
        run_all(source, tmp_path / "run", path, [4], ["stock"], export={"router": "fitted"})
