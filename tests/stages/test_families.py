"""Every supported family, from a tiny random checkpoint to its tied and stock exports, by one test body."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from stages.checkpoint.folder import Checkpoint
from stages.contracts.dendrogram import read_labels
from stages.contracts.evidence import LayerEvidence, read_evidence
from stages.contracts.paths import labels_file
from stages.model.adapter import auto_classes
from stages.model.families import SUPPORTED, expert_count_fields, groups_in, mtp_fields, stock_targets, text_config
from tests.runs import aligned, run_all, streamed_logits, tensor_bytes, token_ids
from tests.tiny import NUM_EXPERTS, ONE_A_CODE_PATH, SETTINGS, build, load, logits, save

MERGED = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [
    *(pytest.param(family, "float32", id=f"{family}-float32") for family in sorted(SUPPORTED)),
    *(pytest.param(family, "bfloat16", id=f"{family}-bfloat16") for family in ONE_A_CODE_PATH),
]
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


@dataclass(frozen=True)
class Case:
    """A family's source checkpoint and one run of the whole pipeline over it."""

    family: str
    dtype: str
    source: Path
    run_dir: Path
    by_layer: tuple[int, ...]
    ids: Tensor

    @cached_property
    def model(self) -> PreTrainedModel:
        return load(self.source)

    @cached_property
    def plan(self) -> dict[str, Any]:
        (path,) = self.run_dir.glob("prepare-model-*/plan.json")
        return json.loads(path.read_text())

    def statistics(self, layer: int) -> LayerEvidence:
        (folder,) = self.run_dir.glob("calibrate-*")
        return read_evidence(folder, layer)

    def labels(self, layer: int, num_clusters: int) -> np.ndarray:
        (path,) = self.run_dir.glob(f"cluster-*/{labels_file(Path(), layer)}")
        return read_labels(path, num_clusters)

    def export(self, target: str) -> Path:
        (path,) = (self.run_dir / "models").glob(f"{self.source.name}-{target}")
        return path

    def experts(self, model: PreTrainedModel) -> dict[int, Any]:
        found = {}
        for name, module in model.named_modules():
            if name.endswith(".experts") and hasattr(module, "num_experts"):
                found[int(name.split("layers.")[1].split(".")[0])] = module
        assert sorted(found) == self.plan["moe_layers"]
        return found

    def logits(self, model: PreTrainedModel) -> Tensor:
        return logits(model, self.ids)


@pytest.fixture(scope="session")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    @cache
    def make(family: str, dtype: str) -> Case:
        torch.set_num_threads(1)
        root = tmp_path_factory.mktemp(f"{family}-{dtype}")
        source = save(build(family, DTYPES[dtype]), root / "tiny")
        path, ids = token_ids(root)
        run_all(source, root / "run", path, [NUM_EXPERTS, MERGED], ["stock"])
        case = Case(family, dtype, source, root / "run", (), ids)
        by_layer = tuple(NUM_EXPERTS - 1 - index for index in range(len(case.plan["moe_layers"])))
        targets = [MERGED, by_layer] if len(set(by_layer)) > 1 else [MERGED]
        run_all(source, root / "run", path, targets, ["tied"])
        return Case(family, dtype, source, root / "run", by_layer, case.ids)

    return make


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_family(family: str, dtype: str, make_case: Callable[[str, str], Case], tmp_path: Path) -> None:
    case = make_case(family, dtype)
    check_streaming(case)
    check_statistics(case)
    check_all_experts_kept(case)
    check_tied(case, f"{MERGED}e-tied", dict.fromkeys(case.plan["moe_layers"], MERGED), tmp_path / "again")
    if len(set(case.by_layer)) > 1:
        targets = dict(zip(case.plan["moe_layers"], case.by_layer, strict=True))
        check_tied(case, "*.*e-*-tied", targets, tmp_path / "again-by-layer")
    check_stock(case)


def check_streaming(case: Case) -> None:
    """1. Layer shards of two layers give the whole model's logits, bit for bit."""
    streamed = streamed_logits(Checkpoint(case.source), case.plan["num_layers"], case.ids)
    assert torch.equal(streamed, case.logits(aligned(load(case.source))))


def routing(case: Case) -> Iterator[tuple[int, Any, Tensor, Tensor, Tensor]]:
    """(layer, experts module, input [T, D], gates [T, E], whether routed [T, E]) as the model itself routes."""
    seen: dict[int, tuple[Any, ...]] = {}
    experts = case.experts(case.model)
    handles = [
        module.register_forward_pre_hook(lambda module, args, layer=layer: seen.__setitem__(layer, args))
        for layer, module in experts.items()
    ]
    inputs: dict[int, Tensor] = {}
    for layer, name in case.plan["routers"].items():
        router = case.model.get_submodule(name)
        handles.append(
            router.register_forward_pre_hook(lambda module, args, layer=int(layer): inputs.__setitem__(layer, args[0]))
        )
    case.logits(case.model)
    for handle in handles:
        handle.remove()
    for layer, module in experts.items():
        if len(seen[layer]) == 3:
            x_TD, index, weights = seen[layer]
            gates = torch.zeros(len(x_TD), NUM_EXPERTS, dtype=torch.float64).scatter(1, index, weights.double())
            routed = torch.zeros(len(x_TD), NUM_EXPERTS, dtype=torch.bool).scatter(1, index, True)
        else:  # Llama 4: blocks of rows, gate times x
            x_TD = inputs[layer].reshape(-1, inputs[layer].shape[-1])
            blocks_ETD = seen[layer][0].view(NUM_EXPERTS, *x_TD.shape)
            gates = (blocks_ETD.double() * x_TD.double()).sum(-1).T / x_TD.double().square().sum(-1, keepdim=True)
            routed = blocks_ETD.abs().sum(-1).T > 0
        yield layer, module, x_TD, gates, routed


def check_statistics(case: Case) -> None:
    """2. Counts and gate sums are the model's own; mean outputs those of every expert on every token."""
    tolerance = TOLERANCE[case.dtype]
    for layer, module, x_TD, gates_TE, routed_TE in routing(case):
        statistics = case.statistics(layer)
        assert statistics.num_tokens == len(x_TD)
        assert statistics["num_routed_tokens"].tolist() == routed_TE.sum(0).tolist()
        np.testing.assert_allclose(statistics["gate_sum"], gates_TE.sum(0).numpy(), rtol=tolerance, atol=1e-6)
        for expert in range(NUM_EXPERTS):
            with torch.inference_mode():
                if hasattr(module, "is_transposed"):
                    shape = (len(x_TD), 1)
                    outputs = module(x_TD, torch.full(shape, expert), torch.ones(shape, dtype=x_TD.dtype))
                else:
                    outputs = module(x_TD.repeat(NUM_EXPERTS, 1)).view(NUM_EXPERTS, *x_TD.shape)[expert]
            mean = outputs.double().mean(0).numpy()
            error = np.linalg.norm(statistics["output_sum"][expert] / len(x_TD) - mean) / np.linalg.norm(mean)
            assert error < tolerance, (layer, expert)
        check_router_scores(case, layer, x_TD, gates_TE, routed_TE)


def check_router_scores(case: Case, layer: int, x_TD: Tensor, gates_TE: Tensor, routed_TE: Tensor) -> None:
    """The stated score is the router's: gates of a token are in proportion to the scores of its experts."""
    probabilities = case.statistics(layer)["router_probability_sum"]
    assert ((probabilities > 0) & (probabilities < len(x_TD))).all()
    if SUPPORTED[case.family].score == "softmax":
        assert probabilities.sum() == pytest.approx(len(x_TD), rel=1e-4)
    router = case.model.get_submodule(case.plan["routers"][str(layer)])
    if case.dtype == "bfloat16" or case.family in ("phimoe", "gemma4_text"):
        return  # sparse mixer, and a scale for each expert: not in proportion
    caught: list[Any] = []
    handle = router.register_forward_hook(lambda module, args, output: caught.append(output))
    case.logits(case.model)
    handle.remove()
    output = caught[0] if isinstance(caught[0], Tensor) else caught[0][case.family == "llama4_text"]
    logits_TE = output.reshape(-1, NUM_EXPERTS).double()
    scores_TE = logits_TE.softmax(-1) if SUPPORTED[case.family].score == "softmax" else logits_TE.sigmoid()
    np.testing.assert_allclose(probabilities, scores_TE.sum(0).numpy(), rtol=1e-4)
    gates, scores = gates_TE[routed_TE].view(len(gates_TE), -1), scores_TE[routed_TE].view(len(gates_TE), -1)
    torch.testing.assert_close(gates / gates.sum(1, keepdim=True), scores / scores.sum(1, keepdim=True), rtol=1e-3, atol=1e-6)


def check_all_experts_kept(case: Case) -> None:
    """3. With r = E every tensor keeps its bytes and the config its values."""
    folder = case.export(f"{NUM_EXPERTS}e-stock")
    assert tensor_bytes(folder) == tensor_bytes(case.source)
    assert json.loads((folder / "config.json").read_text()) == json.loads((case.source / "config.json").read_text())


def expanded(case: Case, targets: dict[int, int]) -> PreTrainedModel:
    """The source in memory with every expert's weights replaced by those of its cluster's average."""
    model = load(case.source)
    for layer, module in case.experts(model).items():
        labels, used = case.labels(layer, targets[layer]), case.statistics(layer)["num_routed_tokens"]
        for parameter in module.parameters(recurse=False):
            values = parameter.detach().double()
            merged = parameter.detach().clone()
            for cluster in range(targets[layer]):
                members = np.flatnonzero(labels == cluster)
                shares = used[members] / used[members].sum() if used[members].sum() else np.full(len(members), 1 / len(members))
                if len(members) > 1:
                    average = sum(share * values[member] for share, member in zip(shares.tolist(), members, strict=True))
                    merged[members] = average.to(parameter.dtype)
            parameter.data = merged
    return model


def parameters(module: Any) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters(recurse=False)]


def check_tied(case: Case, target: str, targets: dict[int, int], again: Path) -> None:
    """4. The tied export is the merged model: logits, generation, and after a round trip."""
    folder = case.export(target)
    tied, reference = load(folder, trust_remote_code=True), expanded(case, targets)
    assert {layer: module.down_proj.shape[0] for layer, module in case.experts(tied).items()} == targets
    found, due = case.logits(tied), case.logits(reference)
    streamed = streamed_logits(Checkpoint(folder), case.plan["num_layers"], case.ids)
    assert torch.equal(streamed, case.logits(aligned(load(folder, trust_remote_code=True))))
    for layer, module in case.experts(tied).items():
        assert module.expert_map.tolist() == case.labels(layer, targets[layer]).tolist()
        for ours, theirs in zip(parameters(module), parameters(case.experts(reference)[layer]), strict=True):
            torch.testing.assert_close(
                ours[module.expert_map], theirs, rtol=2**-7 if case.dtype == "bfloat16" else 1e-6, atol=1e-6
            )
    error_BT = (found.double() - due.double()).abs().amax(-1) / due.abs().max()
    if case.dtype == "float32":
        assert error_BT.max() < 1e-5
    else:  # rounding may send a token whose two experts are close to another one
        assert error_BT.median() < TOLERANCE["bfloat16"]
    if case.dtype == "float32":
        with torch.inference_mode():
            options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(tied.generate(case.ids[:1], **options), reference.generate(case.ids[:1], **options))
    check_every_auto_class(case, folder, tied)
    tied.save_pretrained(again)
    loaded = load(again, trust_remote_code=True)
    state = tied.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(case.logits(loaded), found)


def check_every_auto_class(case: Case, folder: Path, tied: PreTrainedModel) -> None:
    """No Auto class builds the plain model from a tied export: each that knows the family gives a class of ours."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {auto: f"modeling_hcsmoe.HCSMoE{plain}" for auto, plain in auto_classes(Checkpoint(case.source)).items()}
    assert {"AutoModel", "AutoModelForCausalLM"} <= set(auto_map)
    inner = AutoModel.from_pretrained(folder, trust_remote_code=True, local_files_only=True).eval()
    assert type(inner).__name__ == auto_map["AutoModel"].rpartition(".")[2]
    within = next(module for module in tied.modules() if isinstance(getattr(module, "layers", None), torch.nn.ModuleList))
    ours, theirs = ({n: t for n, t in model.state_dict().items() if "expert" in n} for model in (inner, within))
    assert ours and set(ours) == set(theirs) and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    with torch.inference_mode():
        states = [model(case.ids, use_cache=False).last_hidden_state for model in (inner, within)]
    assert torch.equal(*states)


def check_stock(case: Case) -> None:
    """5. The stock export is a smaller model of the same class: it loads whole, runs, and its groups stay valid."""
    folder = case.export(f"{MERGED}e-stock")
    model, info = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert type(model) is type(case.model)
    assert torch.isfinite(case.logits(model.eval())).all()
    source, target = (json.loads((path / "config.json").read_text()) for path in (case.source, folder))
    changed = {key for key in source if source[key] != target.get(key)} | (set(target) - set(source))
    if "rope_theta" in changed:  # a second name of what the source has, for engines that know only this one
        assert "rope_theta" not in source and target["rope_theta"] == source["rope_parameters"]["rope_theta"]
    assert changed - {"rope_theta"} == {*expert_count_fields(source), *mtp_fields(source)}
    check_layout(case, folder)
    if groups := groups_in(source, "here"):
        assert MERGED % groups.num_groups == 0


def check_layout(case: Case, folder: Path) -> None:
    """6. Names and layout are the source's: its first r experts' names, or its fused tensors with a shorter axis."""
    source, target = Checkpoint(case.source), Checkpoint(folder)
    assert set(target.tensors) <= set(source.tensors)
    for name in set(source.tensors) - set(target.tensors):
        assert any(part.isdecimal() and MERGED <= int(part) < NUM_EXPERTS for part in name.split(".")), name
    reduced = 0
    for name, entry in target.tensors.items():
        before = source.tensors[name]
        assert entry.dtype == before.dtype
        if entry.shape != before.shape:
            (axis,) = (axis for axis, size in enumerate(entry.shape) if size != before.shape[axis])
            assert (before.shape[axis], entry.shape[axis]) == (NUM_EXPERTS, MERGED), name
            reduced += 1
    assert reduced >= len(case.plan["moe_layers"])
    assert MERGED in stock_targets(source.config, "source")
    assert text_config(target.config)["model_type"] == case.family


def code_path(family: str, folder: Path) -> tuple[Any, ...]:
    """What decides which of our code a family takes: how transformers computes its experts and how their weights lie on disk, a
    tensor each or fused, beside tensors of which dtypes; and how its router scores."""
    model = build(family, torch.bfloat16)
    source = Checkpoint(save(model, folder))
    module = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    traits = [getattr(module, name, None) for name in ("is_transposed", "is_concatenated", "has_bias", "has_gate")]
    tails = [name.split(".experts.")[1] for name in source.tensors if ".experts." in name]
    is_one_by_one = any(part.isdecimal() for tail in tails for part in tail.split("."))
    dtypes = sorted({entry.dtype for entry in source.tensors.values()})
    facts = SUPPORTED[family]
    return (*traits, is_one_by_one, *dtypes, facts.score, facts.group_scores, facts.gates_input)


def test_every_code_path_has_a_case_in_bfloat16(tmp_path: Path) -> None:
    paths = {family: code_path(family, tmp_path / family) for family in SUPPORTED}
    covered = {paths[family] for family in ONE_A_CODE_PATH}
    assert {family: path for family, path in paths.items() if path not in covered} == {}


def test_every_tiny_config_is_of_a_supported_family() -> None:
    assert set(SUPPORTED) <= set(SETTINGS)
