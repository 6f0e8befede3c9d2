"""Merges that match neurons, through the whole pipeline, against slow references and what must hold for all of them.

Dimensions: T tokens, D hidden size, F neurons of an expert, E experts.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich import filesize
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import silu

from pipeline.checks import check
from pipeline.run.view import RunView
from stages.contracts.errors import InputError
from stages.contracts.evidence import read_evidence
from stages.contracts.layer_plan import read_plan
from stages.contracts.paths import column_file, domain_dir, plan_file
from stages.registry import stage_specs
from tests.runs import digests, read_tensors, run_all, run_config, tensor_bytes, token_ids
from tests.stages.test_neuron_evidence import copied
from tests.stages.test_neurons import slow_zip
from tests.tiny import NUM_EXPERTS, build, load, logits, save

MERGINGS: dict[str, dict[str, str]] = {
    "weights": {"align": "weight"},
    "saliency": {"method": "saliency", "align": "weight"},
    "activations": {"align": "activation"},
    "joined": {"method": "fix_dominant"},
    "zipped": {"method": "zipit"},
}
VARIANTS = [{"name": name, "preset": "hc-smoe", "merging": merging} for name, merging in MERGINGS.items()]
FEATURES = [{"name": name, "preset": "hc-smoe", "clustering": {"feature": name}} for name in ("weight", "token_wise")]


def exports(source: Path, folder: Path, count: int, formats: list[str], variants: list[dict[str, Any]], **changes: Any) -> Any:
    path, _ = token_ids(source.parent)
    return run_all(source, folder, path, [count], formats, variants=variants, **changes)


def inputs_of(source: Path, ids: Tensor) -> dict[int, Tensor]:
    """Input float64 [T, D] of every layer's experts."""
    model, seen = load(source), {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _m, args, n=number: seen.__setitem__(n, args[0].flatten(0, -2).double()))
    logits(model, ids)
    return seen


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every merge over mixtral, beside its source."""
    folder = tmp_path_factory.mktemp("neurons")
    exports(save(build("mixtral", torch.float32), folder / "source"), folder / "run", 3, ["stock"], [*VARIANTS, *FEATURES])
    return folder


def neuron_groups(name: str, experts: list[int], a_TEF: np.ndarray, matrices: list[np.ndarray]) -> list[list[tuple[int, int]]]:
    """(expert, neuron) of each neuron of the merged expert. experts: the reference first. matrices: by expert, [F, 3 D]."""
    size = a_TEF.shape[2]
    reference, *others = experts
    corr = np.corrcoef(np.concatenate([a_TEF[:, one] for one in experts], axis=1), rowvar=False)
    if name == "zipped":
        found = slow_zip((corr + corr.T) / 2, size)
        return [[(experts[n // size], n % size) for n in sorted(group)] for group in found]
    groups = [[(reference, neuron)] for neuron in range(size)]
    for number, one in enumerate(others, 1):
        block = corr[:size, number * size : (number + 1) * size]
        if name == "joined":
            for neuron in range(size):
                groups[int(np.argmax(block[:, neuron]))].append((one, neuron))
            continue
        if name in ("weights", "saliency"):
            block = -np.square(matrices[reference][:, None] - matrices[one][None]).sum(-1)  # the distance itself
        for group, neuron in zip(groups, linear_sum_assignment(-block)[1].tolist(), strict=True):
            group.append((one, neuron))
    return groups


@pytest.mark.parametrize("name", MERGINGS)
def test_merged_tensors_are_those_of_the_formulas(name: str, finished: Path) -> None:
    _, ids = token_ids(finished)
    source, hidden = read_tensors(finished / "source"), inputs_of(finished / "source", ids)
    found = read_tensors(finished / "run" / "models" / f"source-{name}-3e-stock")
    (plan_dir,) = (finished / "run").glob(f"cluster-{name}-3e-stock-*")
    num_matched = 0
    for layer, x_TD in hidden.items():
        prefix = f"model.layers.{layer}.block_sparse_moe"
        parts = [
            [source[f"{prefix}.experts.{e}.{part}.weight"].double() for part in ("w1", "w3", "w2")] for e in range(NUM_EXPERTS)
        ]
        routed = (x_TD @ source[f"{prefix}.gate.weight"].double().T).topk(2).indices
        used = [int((routed == expert).sum()) for expert in range(NUM_EXPERTS)]
        a_TEF = np.stack([(silu(x_TD @ gate.T) * (x_TD @ up.T)).numpy() for gate, up, _ in parts], axis=1)
        matrices = [torch.cat([gate, up, down.T], dim=1).numpy() for gate, up, down in parts]
        for number, slot in enumerate(read_plan(plan_file(plan_dir, layer)).slots):
            weights = {member.expert: member.weight for member in slot.members}
            if name in ("joined", "zipped"):
                assert set(weights.values()) == {1 / len(slot.experts)}
            elif name != "saliency":
                assert weights == pytest.approx({e: used[e] / sum(used[one] for one in slot.experts) for e in slot.experts})
            reference = min(slot.experts, key=lambda expert: (-used[expert], expert))
            experts = [reference, *(one for one in slot.experts if one != reference)]
            groups = neuron_groups(name, experts, a_TEF, matrices)
            num_matched += len(experts) > 1 and any(n != m for group in groups for (_, n), (_, m) in pairwise(group))
            for index, (part, axis) in enumerate((("w1", 0), ("w3", 0), ("w2", 1))):
                due = torch.stack(
                    [
                        sum(weights[e] * parts[e][index].select(axis, n) for e, n in group) / sum(weights[e] for e, _ in group)
                        for group in groups
                    ],
                    dim=axis,
                )
                ours = found[f"{prefix}.experts.{number}.{part}.weight"].double()
                torch.testing.assert_close(ours, due, rtol=1e-5, atol=1e-6)
    assert num_matched >= 3, "no cluster had to be matched"


@pytest.mark.parametrize("feature", ["weight", "token_wise"])
def test_clusters_by_a_feature_begin_with_the_nearest_pair(feature: str, finished: Path) -> None:
    """Distances from transformers' own tensors; with all but one expert kept the nearest two are together."""
    exports(finished / "source", finished / "run", NUM_EXPERTS - 1, ["stock"], FEATURES)
    _, ids = token_ids(finished)
    source, hidden = read_tensors(finished / "source"), inputs_of(finished / "source", ids)
    (plan_dir,) = (finished / "run").glob(f"cluster-{feature}-{NUM_EXPERTS - 1}e-stock-*")
    for layer, x_TD in hidden.items():
        names = [f"model.layers.{layer}.block_sparse_moe.experts.{e}" for e in range(NUM_EXPERTS)]
        parts = [[source[f"{name}.{part}.weight"].double() for part in ("w1", "w3", "w2")] for name in names]
        if feature == "weight":
            vectors = [torch.cat([part.flatten() for part in some]) for some in parts]
        else:
            vectors = [((silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T).flatten() for gate, up, down in parts]
        pairs = [(i, j) for i in range(NUM_EXPERTS) for j in range(i + 1, NUM_EXPERTS)]
        due = min(pairs, key=lambda pair: float((vectors[pair[0]] - vectors[pair[1]]).norm()))
        joined = [slot.experts for slot in read_plan(plan_file(plan_dir, layer)).slots if len(slot.experts) > 1]
        assert joined == [due]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "llama4_text", "qwen2_moe"])
def test_experts_whose_neurons_are_permuted_copies_merge_into_themselves(family: str, tmp_path: Path) -> None:
    """Tied, where the router stays: the model computes what it did. Without matching it does not."""
    twins, _ = copied(save(build(family, torch.float32), tmp_path / "source"), tmp_path / "twins")
    plain = [{"name": "plain", "preset": "hc-smoe"}]
    found = exports(twins, tmp_path / "run", NUM_EXPERTS // 2, ["tied"], [*VARIANTS, *plain])
    _, ids = token_ids(tmp_path)
    due = logits(load(twins), ids)
    for name, folder in found.items():
        error = float((logits(load(folder, trust_remote_code=True), ids) - due).norm() / due.norm())
        assert error > 1e-3 if name.startswith("plain") else error < 1e-5, name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_with_all_experts_every_tensor_keeps_its_bytes(family: str, tmp_path: Path) -> None:
    source = save(build(family, torch.float32), tmp_path / "source")
    for folder in exports(source, tmp_path / "run", NUM_EXPERTS, ["stock"], [*VARIANTS, *FEATURES]).values():
        assert tensor_bytes(folder) == tensor_bytes(source)


def test_evidence_is_the_same_from_any_token_shards(tmp_path: Path) -> None:
    """In the bytes of what is kept for each token; sums of products in all but the last bits."""
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    found = []
    for number, tokens in enumerate((64, 32, 16)):
        data = {
            "data": str(path), "num_sequences": 4, "sequence_length": 16, "tokens_per_micro_batch": 16,
            "tokens_per_shard": tokens,
        }  # fmt: skip
        run_dir = tmp_path / f"run-{number}"
        models = exports(source, run_dir, 3, ["stock"], [*VARIANTS, *FEATURES], calibration=data)
        (folder,) = run_dir.glob("calibrate-*")
        columns = [digests(folder, column_file(Path(), 1, name).name) for name in ("neuron_activations", "weight_gram")]
        assert all(columns)
        found.append((columns, {name: tensor_bytes(model) for name, model in models.items()}))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("preset", ["f-prune", "s-prune", "reap", "ean", "o-prune"])
def test_pruning_an_expert_that_no_token_is_routed_to_changes_nothing(preset: str, tmp_path: Path) -> None:
    """Two of them: their router's bias is so low that they are never picked."""
    model = build("gpt_oss", torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.bias[[2, 5]] = -100.0
    source = save(model, tmp_path / "source")
    (folder,) = exports(source, tmp_path / "run", NUM_EXPERTS - 2, ["stock"], [{"name": "pruned", "preset": preset}]).values()
    _, ids = token_ids(tmp_path)
    torch.testing.assert_close(logits(load(folder), ids), logits(load(source), ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merging", [{"method": "zipit"}, {"align": "weight"}])
def test_neurons_that_do_not_fit_in_memory_are_refused_before_calibration(merging: dict[str, str], tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    variants = [{"name": "large", "preset": "hc-smoe", "merging": merging}]
    message = "merging of large compares the 48 neurons of two experts, which takes .* bytes, more than resources.worker_memory"
    with pytest.raises(InputError, match=message):
        exports(source, tmp_path / "run", 3, ["stock"], variants, resources={"worker_memory": 20_000})
    assert not [*(tmp_path / "run").glob("calibrate-*/**/*.arrow")]


def test_neurons_are_compared_on_tokens_of_every_domain_alike(tmp_path: Path) -> None:
    """Two domains, each with all of its tokens."""
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    for number, name in enumerate(("prose", "code")):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(number).integers(3, 128, (2, 16)))
    data = {
        "data": {"prose": str(tmp_path / "prose.npy"), "code": {"data": str(tmp_path / "code.npy"), "weight": 3}},
        "num_sequences": 4, "sequence_length": 16, "tokens_per_micro_batch": 16, "tokens_per_shard": 16,
    }  # fmt: skip
    variants = [
        {"name": f"{feature}-{given}", "preset": "hc-smoe", "merging": {"method": "zipit"},
         "clustering": {"feature": feature, "domain_weights": given}}
        for feature in ("weight", "token_wise") for given in ("uniform", "given")
    ]  # fmt: skip
    exports(source, tmp_path / "run", 3, ["stock"], variants, calibration=data)
    (folder,) = (tmp_path / "run").glob("calibrate-*")
    for layer in range(3):
        parts = [read_evidence(domain_dir(folder, name), layer, ["neuron_activations"]) for name in ("code", "prose")]
        for part, name in zip(parts, ("code", "prose"), strict=True):
            x_TD = inputs_of(source, torch.from_numpy(np.load(tmp_path / f"{name}.npy")))[layer]
            gate, up = load(source).model.layers[layer].mlp.experts.gate_up_proj[5].double().chunk(2)
            due = (silu(x_TD @ gate.T) * (x_TD @ up.T)).numpy()
            order = [int(np.abs(due - row).sum(1).argmin()) for row in part["neuron_activations"][5]]
            assert sorted(order) == list(range(32)), "every token of the domain is kept, its sequences drawn in any order"
            np.testing.assert_allclose(part["neuron_activations"][5], due[order], rtol=1e-4, atol=1e-5)
        plans = {}
        for variant in variants:
            (plan_dir,) = (tmp_path / "run").glob(f"cluster-{variant['name']}-3e-stock-*")
            plans[variant["name"]] = [slot.experts for slot in read_plan(plan_file(plan_dir, layer)).slots]
        assert plans["weight-uniform"] == plans["weight-given"], "weights of experts do not depend on tokens"


def test_plan_states_what_matching_neurons_and_outputs_of_every_token_cost(tmp_path: Path) -> None:
    """64 tokens of 8 experts with 48 neurons; two experts' 96 neurons, float32."""
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    variants = [VARIANTS[-1], FEATURES[-1]]
    config = run_config(source, tmp_path / "run", path, [3], ["stock"], variants=variants)
    run_all(source, tmp_path / "run", path, [3], ["stock"], variants=variants)
    view = RunView(config, check(config).inputs)
    lines = {spec.name: spec.plan(view).lines for spec in stage_specs() if spec.name in ("calibrate", "cluster")}
    kept, passing, pair = (filesize.decimal(num_bytes) for num_bytes in (4 * 64 * 8 * 48, 8 * 64 * 8 * 48, 4 * 96**2))
    due = f"activations of all neurons are kept on 64 tokens: {kept} a layer, {passing} until they are joined"
    assert due in lines["calibrate"]
    assert any(line.startswith("feature token_wise: every expert's output on every token") for line in lines["calibrate"])
    assert f"memory of a layer whose neurons are matched: {pair} for a pair of experts" in lines["cluster"]
    assert any(line.startswith("  zipit: grows with the square") for line in lines["cluster"])
