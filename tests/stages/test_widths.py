"""Narrower experts: what the config says of them, what is written, and what a run refuses.

Dimensions: D hidden size, F neurons of an expert of the source, K of a narrower one.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from pipeline.config import load_config
from pipeline.config import read_config as read_run_file
from pipeline.display.comparison import Comparison
from stages.contracts.errors import InputError
from stages.contracts.layer_plan import Member, Slot
from stages.contracts.widths import kept_neurons
from stages.model.families import SUPPORTED
from stages.model.widths import SIZES_MORE, SIZES_SHARED, expert_sizes, narrowed, num_neurons_in
from stages.recombine import neurons as choosing
from stages.recombine.solve import Problem, SlotTokens
from tests.runs import read_config, read_tensors, run_all, tensor_bytes, token_ids
from tests.tiny import ONE_A_CODE_PATH, build, load, logits, save, tiny_config

SLIM = {"preset": "slim", "name": "slim", "refit": {"width_multiple": 4, "ridge": 1e-3}}
CHOOSE = {"mode": "sequential", "neurons": "choose", "width_multiple": 4}
SLIMMED = [
    name
    for name in ONE_A_CODE_PATH
    if name not in SIZES_MORE and not (SUPPORTED[name].normalises_outputs or SUPPORTED[name].gates_input)
]


def shapes(family: str, changes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_a_narrower_config_changes_routed_experts_alone(family: str) -> None:
    """The table says of each family what transformers builds from its config."""
    config = tiny_config(family).to_dict()
    size = num_neurons_in(config, "here")
    field = "moe_intermediate_size" if config.get("moe_intermediate_size") is not None else "intermediate_size"
    before, width_alone = shapes(family, {}), shapes(family, {field: size // 2})
    others = {name for name in before if before[name] != width_alone[name] and ".experts." not in name}
    assert bool(others) == (family in SIZES_SHARED or family in SIZES_MORE), others
    down = [shape for name, shape in before.items() if ".experts." in name and "down_proj" in name and len(shape) == 3]
    count, neurons = expert_sizes(config, "here") or (0, 0)
    assert down and all(shape[0] == count and neurons == size in shape[1:] for shape in down), down
    if family in SIZES_MORE:
        with pytest.raises(InputError, match=rf"{field} of {family} also sizes .*, so its experts cannot be narrower"):
            narrowed(config, size // 2, "here")
        return
    after = shapes(family, narrowed(config, size // 2, "here"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all(".experts." in name for name in changed)
    for name in changed:
        (axis,) = (axis for axis, number in enumerate(before[name]) if number != after[name][axis])
        assert before[name][axis] == 2 * after[name][axis] and before[name][axis] in (size, 2 * size)


@pytest.mark.parametrize("family", SLIMMED)
def test_slim_family(family: str, tmp_path: Path) -> None:
    """Half the neurons of all experts: stock transformers loads it, generates, and finds the perplexity that was reported."""
    source = save(build(family, torch.float32), tmp_path / "source")
    path, ids = token_ids(tmp_path)
    text = {"data": str(path), "num_sequences": len(ids), "sequence_length": ids.shape[1]}
    export = run_all(source, tmp_path / "run", path, [4], ["tied"], variants=[SLIM], evaluation=text)["slim-4e-stock"]
    model = load(export)
    assert not hasattr(model.config, "auto_map")
    model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
    due = functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten()).exp()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    row = report["models"][1]
    assert row["perplexity"] == pytest.approx(float(due), rel=1e-4)
    size = num_neurons_in(read_config(source), "source")
    assert (row["num_experts"], row["num_neurons"], row["asked"]) == (8, size // 2, {"experts": 4, "width": 1})
    assert row["parameters"] == sum(tensor.numel() for tensor in read_tensors(export).values())
    before, after = tensor_bytes(source), tensor_bytes(export)
    assert set(before) == set(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed and all("shared" not in name and ("expert" in name or "block_sparse_moe" in name) for name in changed)


def test_kept_neurons_are_whole_neurons_of_the_expert(tmp_path: Path) -> None:
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    path, ids = token_ids(tmp_path)
    targets = [{"experts": 8, "width": 0.5}, {"experts": 4, "width": 0.75}, 4]
    run_dir = tmp_path / "run"
    exports = run_all(source, run_dir, path, targets, ["tied", "stock"], refit=CHOOSE)
    assert set(exports) == {
        *(f"{label}-{form}" for label in ("8e-0.5w", "4e-0.75w", "4e") for form in ("tied", "stock")),
    }  # fmt: skip
    before, due = read_tensors(source), logits(load(source), ids)
    for target, export in exports.items():
        model = load(export, trust_remote_code=True)
        assert torch.isfinite(logits(model, ids)).all()
        if not target.startswith("8e"):
            continue
        assert read_config(export)["intermediate_size"] == 24
        after = read_tensors(export)
        for layer in range(3):
            for expert in range(8):
                prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
                ours, theirs = (
                    [tuple(row) for row in torch.cat([one[f"{prefix}.{w}.weight"] for w in ("w1", "w3")], 1).tolist()]
                    for one in (after, before)
                )
                places = [theirs.index(row) for row in ours]
                assert len(ours) == 24 and places == sorted(places)
        first = {  # the first half of every expert's neurons, as they are
            name: tensor[:24] if name.endswith(("w1.weight", "w3.weight")) else tensor[:, :24] if "w2" in name else tensor
            for name, tensor in before.items()
        }
        naive = load(export, trust_remote_code=True)
        naive.load_state_dict(_as_loaded(naive, first))
        assert (logits(model, ids) - due).norm() < 0.7 * (logits(naive, ids) - due).norm()


def _as_loaded(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the hub to those of transformers' Mixtral."""
    state = model.state_dict()
    for name in state:
        match = re.fullmatch(r"(model\.layers\.\d+)\.mlp\.experts\.(gate_up_proj|down_proj)", name)
        if match:
            prefix = f"{match[1]}.block_sparse_moe.experts"
            parts = ("w1", "w3") if match[2] == "gate_up_proj" else ("w2",)
            rows = [torch.cat([tensors[f"{prefix}.{expert}.{part}.weight"] for part in parts]) for expert in range(8)]
            state[name] = torch.stack(rows)
    return dict(state)


def test_neurons_that_give_nothing_go_without_loss(tmp_path: Path) -> None:
    """Every expert has 24 neurons of zeros, in places of its own."""
    model = build("mixtral", torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for expert in range(8):
                layer.mlp.experts.down_proj[expert][:, torch.randperm(48, generator=generator)[:24]] = 0
    source = save(model, tmp_path / "source")
    path, ids = token_ids(tmp_path)
    slim = {**SLIM, "refit": {"width_multiple": 4, "ridge": 1e-6}}
    export = run_all(source, tmp_path / "run", path, [4], ["stock"], variants=[slim])["slim-4e-stock"]
    due = logits(load(source), ids)
    assert (logits(load(export), ids) - due).norm() < 0.02 * due.norm()


def _not_asked(*_: object) -> Tensor:
    raise AssertionError


def test_an_expert_that_no_token_reaches_keeps_its_largest_neurons() -> None:
    nothing = SlotTokens(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    weight_DF = torch.tensor([[1.0, -5.0, 2.0, 3.0, 0.5]])
    problem = Problem(
        [nothing], lambda slot, tokens: torch.zeros(0, 5), torch.ones(16, 1), torch.ones(16), [weight_DF], "here", [2] * 8
    )
    slot = Slot((0, 1), (Member(0, 0.5), Member(1, 0.5)))
    found = choosing.chosen(slot, problem, 0, choosing.SourceExperts(*[_not_asked] * 4), 3, 100)
    members = choosing.chosen_slot(slot, found, 5).members
    assert members == (Member(0, 0.5, (1, 2, 3)), Member(1, 0.5, (1, 2, 3)))
    assert torch.equal(found.weight_DK, weight_DF[:, [1, 2, 3]])


@pytest.mark.parametrize(
    ("share", "multiple", "kept"), [(0.5, 64, 128), (0.3, 64, 64), (0.01, 64, 64), (0.66, 64, 192), (1, 64, 256), (0.7, 1, 179)]
)
def test_a_width_is_the_nearest_multiple(share: float, multiple: int, kept: int) -> None:
    assert kept_neurons(256, share, multiple) == kept


def test_slim_stands_in_the_column_of_the_target_that_it_was_asked_for() -> None:
    rows = [
        {"variant": "a", "num_experts": 4, "format": "stock", "perplexity": 30.0, "bytes": 1},
        {"variant": "slim", "num_experts": 8, "num_neurons": 24, "asked": {"experts": 4, "width": 1}, "format": "stock",
         "perplexity": 20.0, "bytes": 1},
        {"variant": "a", "num_experts": 8, "num_neurons": 24, "asked": {"experts": 8, "width": 0.5}, "format": "stock",
         "perplexity": 25.0, "bytes": 1},
    ]  # fmt: skip
    report = {"models": [{"name": "source", "perplexity": 20.0}, *rows], "settings": {"variants": []}}
    found = Comparison.of(report)
    assert set(found.columns) == {("4", "stock"), ("8 x 0.5", "stock")}
    assert found.rows["slim"][("4", "stock")].mean == 20.0


def config_of(**clustering: Any) -> Any:
    values = {"model": "m", "run_dir": "r", "calibration": {"data": "x"}, "clustering": clustering, "refit": CHOOSE}
    return read_run_file(values)


def test_targets_are_the_long_form_of_num_experts() -> None:
    short = config_of(num_experts=[8, 6])
    assert config_of(targets=[{"experts": 8}, {"experts": 6, "width": 1}]) == short
    long = config_of(targets=[{"experts": 8, "width": 0.5}, 6])
    assert read_run_file(long.model_dump(mode="json", exclude_none=True)) == long


@pytest.mark.parametrize(
    ("clustering", "message"),
    [
        ({"targets": [{"experts": 8, "width": 2}]}, "num_experts.0.width: Input should be less than or equal to 1 (it is 2)"),
        ({"targets": [{"experts": 8, "width": 0}]}, "num_experts.0.width: Input should be greater than 0 (it is 0)"),
        ({"targets": [{"width": 0.5}]}, "num_experts.0.experts is missing"),
        ({"targets": [{"experts": 8, "breadth": 0.5}]}, "num_experts.0.breadth is not a setting"),
        ({"targets": [8], "num_experts": [8]}, "targets and num_experts are the same setting; leave one of them out"),
        ({"targets": [{"experts": 8, "width": 0.5}] * 2}, "lists a target twice: [{'experts': 8, 'width': 0.5}, {"),
    ],
)
def test_a_mistake_in_a_target_is_one_line(clustering: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {"model": "m", "run_dir": "r", "calibration": {"data": "x"}, "clustering": clustering, "refit": CHOOSE}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as refused:
        load_config(tmp_path / "run.yaml", [])
    assert message in str(refused.value) and ";" not in re.sub("; (leave one|name each once)", "", str(refused.value))


@pytest.mark.parametrize(
    ("family", "targets", "changes", "message"),
    [
        ("mixtral", [{"experts": 8, "width": 0.5}], {}, r"clustering\.targets has a width: experts keep some .* set refit to"),
        ("mixtral", [[8, 8, 6]], {"variants": [{**SLIM, "export": {"formats": ["tied"]}}]},
         r"method slim keeps all experts, equally wide in all layers"),
        ("mixtral", [4], {"variants": [{"name": "slim", "preset": "slim"}]},
         r"0\.5 of 48 neurons is 24, whose nearest multiple of 64 is not below 48; choose a smaller width, or set "),
        ("jamba", [4], {"variants": [SLIM]}, r"intermediate_size of jamba also sizes its dense layers, so its experts"),
        ("deepseek_v3", [6], {"variants": [SLIM]},
         r"also sizes its shared experts \(1 x 24 neurons\), and 24 is no multiple of 16; choose a width whose neurons divide"),
        ("mixtral", [{"experts": 9, "width": 0.5}], {"refit": CHOOSE}, r"clustering\.num_experts is 9 but"),
    ],
)  # fmt: skip
def test_what_no_checkpoint_can_be_is_refused_before_anything_runs(
    family: str, targets: list[Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save(build(family, torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    with pytest.raises(InputError, match=message) as refused:
        run_all(source, tmp_path / "run", path, targets, ["stock"], **changes)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "run.json").exists()


def test_layers_with_different_numbers_of_experts_may_be_narrower_too(tmp_path: Path) -> None:
    """A budget gives the numbers, the target their mean and the width of all."""
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    path, ids = token_ids(tmp_path)
    targets = [{"experts": 5, "width": 0.5}]
    exports = run_all(source, tmp_path / "run", path, targets, ["tied"], refit=CHOOSE, budget={"kind": "usage"})
    config = read_config(exports["5e-0.5w-tied"])
    assert config["intermediate_size"] == 24 and sum(config["hcsmoe_num_experts"].values()) == 15
    assert torch.isfinite(logits(load(exports["5e-0.5w-tied"], trust_remote_code=True), ids)).all()
