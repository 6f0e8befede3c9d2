"""Layers that predict further tokens, which transformers does not load, are dropped with their count, merged, or refused.

Dimensions: E experts.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.reader import TensorReader
from stages.contracts.arrow import Array
from stages.contracts.errors import InputError
from stages.contracts.layer_plan import LayerPlan, Member, RouterRow, Slot
from stages.contracts.tensors import mtp_layers
from stages.model.survey import survey_checkpoint
from stages.mtp.follow import distances, follow
from tests.quantised import checkpoint
from tests.runs import execute, read_config, read_tensors, rewrite, run_all, run_config, tensor_bytes, token_ids
from tests.tiny import NUM_EXPERTS, build, load, logits, save

PREFIXES = {"deepseek_v3": "model.layers.3.", "glm4_moe": "model.layers.3.", "qwen3_next": "mtp.layers.0."}
NUM_GROUPS = {"deepseek_v3": 2, "glm4_moe": 1, "qwen3_next": 1}


def with_mtp(family: str, folder: Path) -> Path:
    """A checkpoint with one more layer, as the hub's have: like the last one, with other weights, under the family's name."""
    source = save(build(family, torch.float32), folder / f"mtp-{family}")
    tensors, config = read_tensors(source), read_config(source)
    prefix, count = PREFIXES[family], {"qwen3_next": "mtp_num_hidden_layers"}.get(family, "num_nextn_predict_layers")
    last = {name: tensor for name, tensor in tensors.items() if "model.layers.2." in name}
    drawn = torch.Generator().manual_seed(0)
    extra = {
        name.replace("model.layers.2.", prefix): torch.randn(tensor.shape, generator=drawn) for name, tensor in last.items()
    }
    extra[f"{prefix}eh_proj.weight"] = torch.ones(32, 64)
    return rewrite(source, {**tensors, **extra}, {**config, count: 1})


def clusters(vectors: list[Tensor], num_clusters: int) -> list[list[int]]:
    """The reference: of all pairs of clusters, the two with the least mean distance are joined, again and again."""
    found = [[expert] for expert in range(len(vectors))]
    apart = {(i, j): float((vectors[i] - vectors[j]).norm()) for i in range(len(vectors)) for j in range(len(vectors))}
    while len(found) > num_clusters:
        one, other = min(
            combinations(range(len(found)), 2),
            key=lambda pair: np.mean([apart[i, j] for i in found[pair[0]] for j in found[pair[1]]]),
        )
        found[one] = sorted(found[one] + found.pop(other))
    return sorted(found)


def medoid(vectors: list[Tensor], members: list[int]) -> int:
    return min(members, key=lambda one: (sum(float((vectors[one] - vectors[other]).norm()) for other in members), one))


def vectors_of(values: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    """All weights of each expert of a layer, float64."""
    return [
        torch.cat(
            [values[f"{prefix}mlp.experts.{expert}.{one}_proj.weight"].double().flatten() for one in ("gate", "up", "down")]
        )
        for expert in range(NUM_EXPERTS)
    ]


def due_clusters(vectors: list[Tensor], num_clusters: int, num_groups: int) -> list[list[int]]:
    """Clusters within each of the router's groups."""
    size = len(vectors) // num_groups
    return [
        [first + member for member in members]
        for first in range(0, len(vectors), size)
        for members in clusters(vectors[first : first + size], num_clusters // num_groups)
    ]


@pytest.mark.parametrize("family", PREFIXES)
def test_dropped_with_their_count_unless_nothing_is_merged(family: str, tmp_path: Path) -> None:
    source = with_mtp(family, tmp_path)
    path, ids = token_ids(tmp_path)
    exports = run_all(source, tmp_path / "run", path, [NUM_EXPERTS, 4], ["stock", "tied"])
    assert tensor_bytes(exports[f"{NUM_EXPERTS}e-stock"]) == tensor_bytes(source)
    assert read_config(exports[f"{NUM_EXPERTS}e-stock"]) == read_config(source)
    for target in ("4e-stock", "4e-tied"):
        names, config = set(read_tensors(exports[target])), read_config(exports[target])
        assert not any("layers.3." in name or name.startswith("mtp.") for name in names)
        assert not config.get("num_nextn_predict_layers") and not config.get("mtp_num_hidden_layers")
        assert torch.isfinite(logits(load(exports[target], trust_remote_code=True), ids)).all()


RULES: dict[str, dict[str, Any]] = {
    "merged": {},
    "pruned": {"clustering": {"method": "reap", "num_experts": [4]}},
    "one of each": {"merging": {"method": "dominant"}, "export": {"mtp": "merge", "router": "dominant"}},
    "recombined": {"refit": {"mode": "sequential", "neurons": "choose"}},
}
"""Settings by what the plan of the last MoE layer is like."""


@pytest.mark.parametrize(
    ("family", "rule"),
    [*(("deepseek_v3", rule) for rule in RULES), ("glm4_moe", "merged"), ("glm4_moe", "pruned"), ("qwen3_next", "merged")],
)
def test_kept_with_as_many_experts_by_its_own_weights(family: str, rule: str, tmp_path: Path) -> None:
    source = with_mtp(family, tmp_path)
    path, ids = token_ids(tmp_path)
    formats = ["stock"] if rule == "pruned" else ["stock", "tied"]
    exports = run_all(source, tmp_path / "run", path, [4], formats, **{"export": {"mtp": "merge"}, **RULES[rule]})
    found, given, prefix = read_tensors(exports["4e-stock"]), read_tensors(source), PREFIXES[family]
    ours = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    last = {name.removeprefix("model.layers.2."): tensor for name, tensor in found.items() if "model.layers.2." in name}
    assert {name: tensor.shape for name, tensor in ours.items() if name != "eh_proj.weight"} == {
        name: tensor.shape for name, tensor in last.items()
    }
    vectors = vectors_of(given, prefix)
    made_of = due_clusters(vectors, 4, NUM_GROUPS[family])
    taken = made_of if rule in ("merged", "recombined") else [[medoid(vectors, members)] for members in made_of]
    routers = [name for name in ours if name.endswith(("mlp.gate.weight", "e_score_correction_bias"))]
    assert routers
    for name in routers:
        due = torch.stack([given[prefix + name][members].mean(0) for members in taken])
        torch.testing.assert_close(ours[name], due)
    for number, members in enumerate(taken):
        for one in ("gate", "up", "down"):
            tensors = [given[f"{prefix}mlp.experts.{member}.{one}_proj.weight"] for member in members]
            torch.testing.assert_close(ours[f"mlp.experts.{number}.{one}_proj.weight"], torch.stack(tensors).mean(0))
    for name, tensor in ours.items():
        if ".experts." not in name and name not in routers:
            assert torch.equal(tensor, given[prefix + name]), name
    count = {"qwen3_next": "mtp_num_hidden_layers"}.get(family, "num_nextn_predict_layers")
    assert read_config(exports["4e-stock"])[count] == 1
    assert torch.isfinite(logits(load(exports["4e-stock"]), ids)).all()
    if "4e-tied" in exports:
        assert not read_config(exports["4e-tied"]).get(count)
        assert not any(name.startswith(prefix) for name in read_tensors(exports["4e-tied"]))


def test_several_layers_have_plans_of_their_own_and_need_no_new_plans_of_others(tmp_path: Path) -> None:
    source = with_mtp("glm4_moe", tmp_path)
    tensors = read_tensors(source)
    drawn = torch.Generator().manual_seed(1)
    more = {
        name.replace("layers.3.", f"layers.{layer}."): torch.randn(tensor.shape, generator=drawn)
        for layer in (10, 9)
        for name, tensor in tensors.items()
        if "layers.3." in name
    }
    plain, _ = survey_checkpoint(str(source))
    rewrite(source, {**tensors, **more}, {**read_config(source), "num_nextn_predict_layers": 3})
    survey, rows = survey_checkpoint(str(source))
    assert {name: survey_values for name, survey_values in vars(survey).items() if name.endswith("_bytes")} == {
        **{name: values for name, values in vars(plain).items() if name.endswith("_bytes")}, "total_bytes": survey.total_bytes,
    }, "no worker loads these layers"  # fmt: skip
    assert mtp_layers(rows) == [3, 4, 5]
    numbers = {row.name.split(".")[2]: row.layer for row in rows if row.role == "mtp" and row.like}
    assert numbers == {"3": 3, "9": 4, "10": 5}, "in the order of the model's own numbers"
    path, _ = token_ids(tmp_path)
    settings = {"refit": {"mode": "one_shot"}}
    execute(run_config(source, tmp_path / "run", path, [4], ["stock"], **settings))
    _, recorder = execute(run_config(source, tmp_path / "run", path, [4], ["stock"], export={"mtp": "merge"}, **settings))
    assert recorder.stages == {"mtp", "merge", "assemble", "report"}, "neither plans nor refits are made again"
    (folder,) = (tmp_path / "run" / "models").iterdir()
    found, given = read_tensors(folder), read_tensors(source)
    plans = []
    for layer in (3, 9, 10):
        plans.append(clusters(vectors_of(given, f"model.layers.{layer}."), 4))
        for number, members in enumerate(plans[-1]):
            name = f"model.layers.{layer}.mlp.experts.{{}}.up_proj.weight"
            due = torch.stack([given[name.format(member)] for member in members]).mean(0)
            torch.testing.assert_close(found[name.format(number)], due)
    assert plans[0] != plans[1] != plans[2] != plans[0]


@pytest.mark.parametrize("method", ["hierarchical", "reap"])
def test_packed_layers_are_compared_by_values_and_packed_alike(method: str, tmp_path: Path) -> None:
    packed, _ = checkpoint("int4", tmp_path)
    tensors, turned = read_tensors(packed), {str(expert): str((3 * expert + 1) % NUM_EXPERTS) for expert in range(NUM_EXPERTS)}
    more = {}
    for name, tensor in tensors.items():
        if "layers.2." in name:
            *before, last = name.replace("layers.2.", "layers.3.").partition(".experts.")
            expert, dot, rest = last.partition(".")
            more["".join([*before, turned.get(expert, expert), dot, rest])] = tensor.clone()
    rewrite(packed, {**tensors, **more}, {**read_config(packed), "num_nextn_predict_layers": 1})
    path, _ = token_ids(tmp_path)
    clustering = {"method": method, "num_experts": [4]}
    exports = run_all(packed, tmp_path / "run", path, [4], ["stock"], export={"mtp": "merge"}, clustering=clustering)
    with TensorReader(Checkpoint(packed)) as reader, TensorReader(Checkpoint(exports["4e-stock"])) as made:
        prefix = "model.layers.3."
        vectors = vectors_of({name: reader.read(name) for name in reader.checkpoint.tensors if prefix in name}, prefix)
        ours = {name: made.read(name) for name in made.checkpoint.tensors if prefix in name}
    before, after = (tensor_bytes(folder) for folder in (packed, exports["4e-stock"]))
    for number, members in enumerate(clusters(vectors, 4)):
        alone = members[0] if len(members) == 1 else medoid(vectors, members) if method == "reap" else None
        for one in ("gate", "up", "down"):
            name = f"{prefix}mlp.experts.{{}}.{one}_proj.weight"
            if alone is not None:
                for part in ("_packed", "_scale", "_shape"):
                    assert after[name.format(number) + part] == before[name.format(alone) + part], "an expert's own bytes"
                continue
            with TensorReader(Checkpoint(packed)) as reader:
                due = torch.stack([reader.read(name.format(member)) for member in members]).mean(0)
            groups = due.view(len(due), -1, 32)
            step = 2 * groups.abs().amax(-1, keepdim=True) / 15 * 1.01  # of 15 steps from the least to the largest number
            assert bool(((ours[name.format(number)].view_as(groups) - groups).abs() <= step).all())


def _plan(*slots: tuple[tuple[int, ...], tuple[Member, ...], tuple[tuple[int, float], ...]]) -> LayerPlan:
    return LayerPlan(2, 4, tuple(Slot(experts, members, row=RouterRow(row)) for experts, members, row in slots))


POINTS = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 1.0], [10.0, 0.5]])
"""Experts 0 and 2 are alike, and 1 and 3."""
BOTH = ((0, 0.75), (1, 0.25))


def _distance_EE() -> Array:
    return distances(POINTS @ POINTS.T)


def test_distances_are_euclidean_and_none_is_below_nothing() -> None:
    due = np.linalg.norm(POINTS[:, None] - POINTS, axis=-1)
    np.testing.assert_allclose(_distance_EE(), due, atol=1e-6)
    noisy = np.array([[1.0, 1.0 + 1e-15], [1.0, 1.0 - 1e-15]])
    assert (distances(noisy) >= 0).all() and not np.isnan(distances(noisy)).any()


def test_what_a_cluster_becomes_follows_the_other_plan() -> None:
    merged = _plan(((0, 1), tuple(Member(*one) for one in BOTH), BOTH), ((2, 3), (Member(2, 0.5), Member(3, 0.5)), ((2, 1.0),)))
    found = follow(merged, 7, _distance_EE(), 1)
    assert (found.layer, found.num_experts, found.replaced) == (7, 4, ())
    assert [slot.experts for slot in found.slots] == [(0, 2), (1, 3)]
    assert [slot.members for slot in found.slots] == [(Member(0, 0.5), Member(2, 0.5)), (Member(1, 0.5), Member(3, 0.5))]
    assert [slot.row for slot in found.slots] == [RouterRow(((0, 0.5), (2, 0.5))), RouterRow(((1, 0.5), (3, 0.5)))]

    dropping = _plan(((0,), (Member(0), Member(1, 0.0)), ((0, 1.0),)), ((3,), (Member(3),), ((3, 1.0),)))
    found = follow(dropping, 7, _distance_EE(), 1)
    assert [(slot.experts, slot.members, slot.row) for slot in found.slots] == [
        ((0,), (Member(0),), RouterRow(((0, 1.0),))), ((1,), (Member(1),), RouterRow(((1, 1.0),)))
    ]  # fmt: skip

    representing = _plan(((0, 1), (Member(1),), BOTH), ((2, 3), (Member(3),), ((2, 0.5), (3, 0.5))))
    found = follow(representing, 7, _distance_EE(), 1)
    assert [(slot.experts, slot.members) for slot in found.slots] == [((0, 2), (Member(0),)), ((1, 3), (Member(1),))]
    assert found.slots[0].row == RouterRow(((0, 0.5), (2, 0.5)))

    chosen = _plan(((0, 1), (Member(0, neurons=(1,)),), BOTH), ((2, 3), (Member(3, neurons=(0,)),), BOTH))
    assert follow(chosen, 7, _distance_EE(), 1).slots[0].members == (Member(0, 0.5), Member(2, 0.5)), "whole experts"


def test_slots_stay_in_the_groups_of_the_router() -> None:
    plan = _plan(((0, 1), (Member(0),), ((0, 1.0),)), ((2, 3), (Member(2),), ((2, 1.0),)))
    assert [slot.experts for slot in follow(plan, 7, _distance_EE(), 2).slots] == [(0, 1), (2, 3)]


def test_experts_that_are_unlike_the_last_layers_are_refused_for_merging(tmp_path: Path) -> None:
    source = with_mtp("deepseek_v3", tmp_path)
    tensors = read_tensors(source)
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    rewrite(source, {**tensors, name: tensors[name][:4].clone()})
    path, _ = token_ids(tmp_path)
    with pytest.raises(InputError, match=r"experts\.5\.up_proj\.weight predicts further tokens .* set export\.mtp to drop"):
        run_all(source, tmp_path / "run", path, [4], ["stock"], export={"mtp": "merge"})


def test_refused_by_policy(tmp_path: Path) -> None:
    source = with_mtp("deepseek_v3", tmp_path)
    path, _ = token_ids(tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors: tensor model\.layers\.3\..*export\.mtp is error"):
        run_all(source, tmp_path / "run", path, [4], ["stock"], export={"mtp": "error"})
    assert not (tmp_path / "run" / "models").exists() and not [*(tmp_path / "run").glob("calibrate-*/layer*")]


def test_a_layer_that_the_config_does_not_know_is_refused(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    extra: dict[str, Tensor] = {"model.layers.3.input_layernorm.weight": torch.ones(32)}
    rewrite(source, {**read_tensors(source), **extra})
    with pytest.raises(InputError, match=r"tensor model\.layers\.3\.input_layernorm\.weight belongs to layer 3"):
        survey_checkpoint(str(source))
