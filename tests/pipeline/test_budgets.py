"""Runs whose layers keep different numbers of experts, whose super experts stay, or that prune by the layer's output: what they
leave, as any user loads it, and what they refuse.

Dimensions: D hidden size, E experts, T tokens.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pipeline.checks import check
from pipeline.commands.plan import describe_plan
from pipeline.config import load_config
from pipeline.display.comparison import Comparison
from pipeline.run.variants import methods, presets
from stages.contracts.errors import InputError
from stages.contracts.evidence import read_evidence
from stages.contracts.layer_plan import read_plan
from stages.contracts.paths import domain_dir, plan_file
from tests.runs import FinishedRun, read_tensors, rewrite, tensor_bytes, write_run_file
from tests.stages.test_statistics import Layer
from tests.tiny import FAMILIES, build, load, logits, random_ids, save, save_checkpoint

TIED = {"formats": ["tied"]}
VARIANTS: list[Any] = [
    "m-smoe-global",
    {"name": "heights", "preset": "hc-smoe", "budget": {"kind": "heights"}, "export": TIED},
    {"name": "error", "preset": "hc-smoe", "budget": {"kind": "error"}, "export": TIED},
    {"name": "refit", "preset": "hc-recombine", "budget": {"kind": "heights", "least": 3}, "export": TIED},
]
BUDGETS = ["m-smoe-global", "heights", "error", "refit"]


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def done(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[[str], Path],
    token_ids: Path,
) -> FinishedRun:
    folder = tmp_path_factory.mktemp(f"budgets-{request.param}")
    settings = {"clustering.num_experts": [4], "variants": [*VARIANTS, "hc-smoe", "o-prune"]}
    return FinishedRun.of(write_run_file(folder, tiny_checkpoint(request.param), token_ids, settings))


def row(done: FinishedRun, variant: str) -> dict[str, Any]:
    return next(one for one in done.report["models"] if one.get("variant") == variant)


@pytest.mark.parametrize("variant", BUDGETS)
def test_layers_keep_different_numbers_with_the_uniform_total(done: FinishedRun, variant: str) -> None:
    layers, found = done.view.survey.moe_layers, row(done, variant)
    counts = {int(layer): count for layer, count in found["experts_by_layer"].items()}
    assert list(counts) == list(layers) and sum(counts.values()) == 4 * len(layers) and found["num_experts"] == 4
    assert min(counts.values()) >= (3 if variant == "refit" else 2)
    uniform = next(one for one in done.report["models"] if one.get("variant") == "hc-smoe" and one["format"] == "tied")
    assert found["parameters"] == uniform["parameters"] and "experts_by_layer" not in uniform
    folder = done.model(f"{variant}-4e-tied")
    config = json.loads((folder / "config.json").read_text())
    assert config["hcsmoe_num_experts"] == {str(layer): count for layer, count in counts.items()}
    for layer, count in counts.items():
        part = done.part("recombine" if variant == "refit" else "cluster", f"{variant}-4e-tied")
        plan = read_plan(plan_file(done.run_dir / part.dir, layer))
        assert len(plan.slots) == count
        (slot_E,) = (one for name, one in read_tensors(folder).items() if name.endswith("map") and f"layers.{layer}." in name)
        assert slot_E.tolist() == plan.slot_E.tolist() and set(slot_E.tolist()) == set(range(count))


def test_some_budget_differs_between_layers(done: FinishedRun) -> None:
    assert any(len(set(row(done, variant)["experts_by_layer"].values())) > 1 for variant in BUDGETS)


@pytest.mark.parametrize("variant", BUDGETS)
def test_the_checkpoint_loads_generates_and_has_the_stated_perplexity(done: FinishedRun, variant: str) -> None:
    model = load(done.model(f"{variant}-4e-tied"), trust_remote_code=True)
    prompt = torch.from_numpy(random_ids(2, 5, seed=3))
    text = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    greedy = prompt
    for _ in range(6):
        greedy = torch.cat([greedy, logits(model, greedy.numpy())[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(text, greedy)
    ids = random_ids()
    found = logits(model, ids)[:, :-1].flatten(0, 1).double()
    loss = cross_entropy(found, torch.from_numpy(ids[:, 1:]).flatten())
    assert row(done, variant)["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_m_smoes_centres_are_the_most_used_experts_of_all_layers(done: FinishedRun) -> None:
    """But for two of each layer, which a token picks."""
    layers = done.view.survey.moe_layers
    used = {layer: sorted(read_evidence(done.calibrate_dir, layer)["num_routed_tokens"].tolist()) for layer in layers}
    further = sorted(count for one in used.values() for count in one[:-2])[-2 * len(layers) :]
    due = sum(sum(one[-2:]) for one in used.values()) + sum(further)
    counts = row(done, "m-smoe-global")["experts_by_layer"]
    assert sum(sum(used[layer][-counts[str(layer)] :]) for layer in layers) == due
    plan_dir = done.run_dir / done.part("cluster", "m-smoe-global-4e-tied").dir
    for layer in layers:
        used_E = read_evidence(done.calibrate_dir, layer)["num_routed_tokens"]
        tops = sorted(
            max(int(used_E[expert]) for expert in slot.experts) for slot in read_plan(plan_file(plan_dir, layer)).slots
        )
        assert tops == used[layer][-len(tops) :], "each slot has one of the most used experts"


def test_the_card_and_the_comparison_say_so(done: FinishedRun) -> None:
    card = (done.model("m-smoe-global-4e-tied") / "README.md").read_text()
    counts = row(done, "m-smoe-global")["experts_by_layer"].values()
    assert f"merged to 4 on average ({min(counts)} to {max(counts)})," in card
    assert "- Budget: One threshold of use (M-SMoE, arXiv:2310.01334)" in card and "\nbudget:\n  kind: usage\n" in card
    assert "budget" not in (done.model("hc-smoe-4e-tied") / "README.md").read_text().lower()
    assert ("4", "tied") in Comparison.of(done.report).rows["m-smoe-global"]


def outputs(layer: Layer, kept: Sequence[int]) -> Tensor:
    """Routed output [T, D] of a layer whose router has the rows of these experts alone, in float64."""
    scores = (layer.x_TD @ layer.router.weight[list(kept)].double().T).softmax(1)
    gates, picked = scores.topk(2, dim=1)
    gates = gates / gates.sum(1, keepdim=True)  # the tiny qwen3_moe is made with norm_topk_prob
    total = torch.zeros_like(layer.x_TD)
    for place, expert in enumerate(kept):
        total += (gates * (picked == place)).sum(1, keepdim=True) * layer.outputs_of(expert)
    return total


def test_o_prune_keeps_the_experts_whose_layer_is_nearest_to_the_source(done: FinishedRun) -> None:
    """All 256 tokens are sampled, so every layer can be made without each set of experts and compared."""
    folder, source = done.model("o-prune-4e-stock"), read_tensors(done.source)
    kept_tensors = read_tensors(folder)
    for index in done.view.survey.moe_layers:
        layer = Layer(done.source, index, random_ids())
        whole = outputs(layer, range(layer.num_experts))
        errors = {
            kept: float((outputs(layer, kept) - whole).square().sum()) for kept in combinations(range(layer.num_experts), 4)
        }
        plan = read_plan(plan_file(done.run_dir / done.part("cluster", "o-prune-4e-stock").dir, index))
        found = tuple(slot.experts[0] for slot in plan.slots)
        assert found == min(errors, key=lambda kept: errors[kept])
        for name, tensor in source.items():
            for slot, expert in enumerate(found):
                if f"layers.{index}." in name and f".experts.{expert}." in name:
                    assert torch.equal(kept_tensors[name.replace(f".experts.{expert}.", f".experts.{slot}.")], tensor)


def test_the_evidence_of_sampled_tokens_does_not_depend_on_shards(done: FinishedRun, tmp_path: Path, token_ids: Path) -> None:
    settings = {
        "clustering": {"num_experts": [4], "method": "o_prune"}, "export.formats": ["stock"], "evaluation": None,
        "calibration.tokens_per_shard": 32, "calibration.tokens_per_micro_batch": 32,
    }  # fmt: skip
    other = FinishedRun.of(write_run_file(tmp_path, done.source, token_ids, settings))
    columns = ("sampled_output_gram", "sampled_gates", "sampled_logits")
    for layer in done.view.survey.moe_layers:
        one, two = (read_evidence(run.calibrate_dir, layer, columns) for run in (done, other))
        for column in columns:
            np.testing.assert_allclose(one[column], two[column], rtol=1e-4, atol=1e-4)


def test_all_experts_are_kept_byte_for_byte(tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path) -> None:
    source, count = tiny_checkpoint("mixtral"), FAMILIES["mixtral"].num_experts
    variants = [*VARIANTS[:3], {"name": "o", "preset": "o-prune", "clustering": {"protect": "super"}}]
    settings = {"clustering.num_experts": [count], "variants": variants, "evaluation": None}
    other = FinishedRun.of(write_run_file(tmp_path, source, token_ids, settings))
    due = tensor_bytes(source)
    for target in other.view.targets:
        found = tensor_bytes(other.model(target.part))
        assert {name: value for name, value in found.items() if not name.endswith("expert_map")} == due


OUTLIER = (1, 4)
"""Layer and expert whose down projection is made large."""
PRUNING = sorted(
    name for name, preset in presets().items()
    if not methods()[str(preset["clustering"]["method"])].reads_merging and "refit" not in preset
)  # fmt: skip


@pytest.fixture(scope="module")
def protecting(tmp_path_factory: pytest.TempPathFactory, token_ids: Path) -> Iterator[FinishedRun]:
    root = tmp_path_factory.mktemp("super")
    source = save_checkpoint(root / "tiny", "mixtral")
    tensors = read_tensors(source)
    layer, expert = OUTLIER
    tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"] *= 40
    rewrite(source, tensors)
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    protect = {"clustering": {"protect": "super"}}
    names = ["hc-smoe", "kmeans", "m-smoe", "ream", "recombine", "random", *PRUNING]
    variants = [{"name": f"p-{name}", "preset": name, **protect} for name in names]
    variants.append({"name": "p-global", "preset": "m-smoe-global", **protect})
    settings = {"clustering.num_experts": [3], "variants": [*variants, "hc-smoe"], "evaluation": None}
    yield FinishedRun.of(write_run_file(root, source, token_ids, settings))


def test_a_super_expert_keeps_its_bytes_under_every_method(protecting: FinishedRun) -> None:
    layer, expert = OUTLIER
    source = tensor_bytes(protecting.source)
    for target in protecting.view.targets:
        plan = read_plan(plan_file(protecting.run_dir / protecting.part("cluster", target.part).dir, layer))
        (slot,) = (number for number, one in enumerate(plan.slots) if expert in one.experts)
        if target.variant.name == "hc-smoe":
            continue
        assert plan.slots[slot].experts == (expert,), target.name
        made = tensor_bytes(protecting.model(target.part))
        prefix = f"model.layers.{layer}.block_sparse_moe"
        for matrix in ("w1", "w2", "w3") if target.variant.refit.mode == "none" else ("w1", "w3"):
            assert made[f"{prefix}.experts.{slot}.{matrix}.weight"] == source[f"{prefix}.experts.{expert}.{matrix}.weight"]


def test_experts_that_are_kept_keep_their_bytes_and_rows_under_every_pruning_rule(protecting: FinishedRun) -> None:
    source, pruned = tensor_bytes(protecting.source), {f"p-{name}" for name in PRUNING}
    assert pruned == {"p-f-prune", "p-s-prune", "p-reap", "p-ean", "p-o-prune", "p-random-prune"}
    rows = read_tensors(protecting.source)
    for target in (one for one in protecting.view.targets if one.variant.name in pruned):
        made, made_rows = tensor_bytes(protecting.model(target.part)), read_tensors(protecting.model(target.part))
        plan_dir = protecting.run_dir / protecting.part("cluster", target.part).dir
        for layer in protecting.view.survey.moe_layers:
            prefix, kept = f"model.layers.{layer}.block_sparse_moe", []
            for number, slot in enumerate(read_plan(plan_file(plan_dir, layer)).slots):
                kept += slot.experts
                for matrix in ("w1", "w2", "w3"):
                    due = source[f"{prefix}.experts.{slot.experts[0]}.{matrix}.weight"]
                    assert made[f"{prefix}.experts.{number}.{matrix}.weight"] == due, target.name
            assert len(kept) == 3 and torch.equal(made_rows[f"{prefix}.gate.weight"], rows[f"{prefix}.gate.weight"][kept])


def test_the_report_and_the_comparison_name_super_experts(protecting: FinishedRun) -> None:
    layer, expert = OUTLIER
    rows = [one for one in protecting.report["models"] if one["variant"]]
    assert all(one["super_experts"] == {str(layer): [expert]} for one in rows if one["variant"] != "hc-smoe")
    assert all("super_experts" not in one for one in rows if one["variant"] == "hc-smoe")
    comparison = Comparison.of(protecting.report)
    (line,) = comparison.super_lines
    assert line.startswith(f"super        layer {layer}: {expert} (kept as they are in ") and "p-global-3e-tied" in line
    assert comparison.values()["super_experts"] == [line]


def test_protection_and_budgets_change_the_keys_of_no_other_run(protecting: FinishedRun) -> None:
    plain, kept = (protecting.part("cluster", f"{name}-3e-tied") for name in ("hc-smoe", "p-hc-smoe"))
    settings = plain.identity["settings"]
    assert isinstance(settings, dict) and not {"protect", "budget"} & settings.keys() and plain.key != kept.key
    assert protecting.part("cluster", "hc-smoe").key == protecting.part("cluster", "p-hc-smoe").key, "dendrograms are the same"


def test_plan_says_what_is_decided_later_and_what_the_sample_takes(done: FinishedRun) -> None:
    lines = [item for item in describe_plan(load_config(done.run_file, [])) if isinstance(item, str)]
    assert "inner products of experts are kept on 256 tokens: 73.7 kB a layer, 73.7 kB until they are joined" in lines
    assert any(line.startswith("budget of m-smoe-global-4e-tied: usage decides each layer's number") for line in lines)


WRONG = {
    "budget.kind=far": "budget.kind: there is no budget named 'far'; known: error, heights, uniform, usage",
    "budget.kind=usage": "budget.kind is usage, which gives layers different numbers of experts, but a stock export is the "
    "source's own architecture, whose config has one number for all layers; set export.formats to [tied]",
    "variants=[{name: a, preset: reap, budget: {kind: usage}}]": "variants: a: budget.kind is usage, which gives layers "
    "different numbers of experts, but what method reap drops only a stock export can express",
    "variants=[{name: a, preset: kmeans, budget: {kind: heights}, export: {formats: [tied]}}]": "variants: a: budget.kind is "
    "heights, but method kmeans has no dendrogram; choose hierarchical, or another budget",
    "variants=[{name: a, preset: kmeans, budget: {far: 1}}]": "variants: a: budget.far is not a setting",
    "clustering.protect=all": "clustering.protect: Input should be 'none' or 'super'",
    "budget.least=0": "budget.least: Input should be greater than or equal to 1",
}


@pytest.mark.parametrize(("setting", "message"), WRONG.items())
def test_a_budget_that_does_not_go_with_a_method_or_format_is_one_line(tmp_path: Path, setting: str, message: str) -> None:
    run_file = write_run_file(tmp_path, tmp_path / "model", tmp_path / "ids.npy", {})
    with pytest.raises(InputError) as refused:
        load_config(run_file, [setting])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_mean_is_one_number(tmp_path: Path) -> None:
    settings = {"clustering.num_experts": [[2, 3, 4]], "export.formats": ["tied"]}
    run_file = write_run_file(tmp_path, tmp_path / "model", tmp_path / "ids.npy", settings)
    with pytest.raises(InputError, match=r"budget\.kind is usage, but clustering\.num_experts lists a number for each layer"):
        load_config(run_file, ["budget.kind=usage"])


BOUNDS = {
    "budget={kind: usage, least: 4}": "clustering.num_experts is 3, but with budget.kind usage a layer keeps at least 4 "
    "experts, a multiple of 1, of 6; use 4 to 6",
    "budget={multiple_of: 2}": "clustering.num_experts is 3, but with budget.kind uniform a layer keeps at least 1 experts, a "
    "multiple of 2, of 6; use 2 to 6",
    "budget={multiple_of: 7}": "a multiple of 7, of 6; lower budget.least or budget.multiple_of",
    "clustering.num_experts=[1]": "clustering.num_experts is 1, but with budget.kind usage a layer keeps at least 2 experts",
}


@pytest.mark.parametrize(("setting", "message"), BOUNDS.items())
def test_numbers_out_of_bounds_are_refused_before_anything_runs(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path, setting: str, message: str
) -> None:
    run_file = write_run_file(tmp_path, tiny_checkpoint("mixtral"), token_ids, {"export.formats": ["tied"]})
    with pytest.raises(InputError) as refused:
        check(load_config(run_file, ["budget.kind=usage", setting]))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("deepseek_v3", {"clustering.method": "o_prune"}, "in this family the router first picks groups of experts"),
        ("phimoe", {"clustering.method": "o_prune"}, "its second gate is made of what the first pick leaves"),
        ("llama4_text", {"clustering.method": "o_prune"}, "gates multiply its experts' inputs; choose another method"),
        ("llama4_text", {"budget.kind": "error", "export.formats": ["tied"]}, "budget.kind is error, but this family's gates"),
    ],
)
def test_families_that_a_method_or_budget_cannot_follow_are_one_line(
    tmp_path: Path, token_ids: Path, family: str, settings: dict[str, Any], message: str
) -> None:
    source = save(build(family, torch.float32), tmp_path / "tiny")
    given = {"clustering.num_experts": [4], "export.formats": ["stock"], **settings}
    with pytest.raises(InputError) as refused:
        check(load_config(write_run_file(tmp_path, source, token_ids, given), []))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text", "deepseek_v3", "jamba", "nemotron_h", "qwen3_next"])
def test_other_families_load_with_different_numbers_of_experts(tmp_path: Path, token_ids: Path, family: str) -> None:
    """Experts that are transposed, have biases, have gates on their inputs, are behind groups, or beside other layers."""
    source = save(build(family, torch.float32), tmp_path / "tiny")
    settings = {"clustering.num_experts": [4], "export.formats": ["tied"], "budget.kind": "heights"}
    other = FinishedRun.of(write_run_file(tmp_path, source, token_ids, settings))
    counts = other.report["models"][1]["experts_by_layer"]
    model = load(other.model("4e-tied"), trust_remote_code=True)
    downs = {
        name.split(".layers.")[1]: len(one) for name, one in model.named_parameters() if name.endswith(".experts.down_proj")
    }
    found = {name.split(".")[0]: count for name, count in downs.items()}
    assert {layer: found[layer] for layer in counts} == counts and sum(counts.values()) == 4 * len(counts)
    ids = random_ids()
    loss = cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1).double(), torch.from_numpy(ids[:, 1:]).flatten())
    assert other.report["models"][1]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)


def test_domains_are_sampled_apart_and_give_plans_together(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path], token_ids: Path
) -> None:
    other = tmp_path / "other.npy"
    np.save(other, random_ids(8, 32, seed=5))
    preset = {"preset": "hc-smoe", "clustering": {"protect": "super"}, "budget": {"kind": "error"}, "export": TIED}
    settings = {
        "calibration.data": {"a": str(token_ids), "b": str(other)}, "calibration.num_sequences": 9, "evaluation": None,
        "clustering.num_experts": [4], "variants": [{"name": "e", **preset}, "o-prune"],
    }  # fmt: skip
    run = FinishedRun.of(write_run_file(tmp_path, tiny_checkpoint("mixtral"), token_ids, settings))
    for layer in run.view.survey.moe_layers:
        for domain, num_sequences in {"a": 5, "b": 4}.items():
            evidence = read_evidence(domain_dir(run.calibrate_dir, domain), layer, ["sampled_gates"])
            assert evidence["sampled_gates"].shape == (6, num_sequences * 32) == (6, evidence.num_tokens)
            assert ((evidence["sampled_gates"] > 0).sum(1) == evidence["num_routed_tokens"]).all()
    counts = next(one for one in run.report["models"] if one.get("variant") == "e")["experts_by_layer"]
    assert sum(counts.values()) == 4 * 3
