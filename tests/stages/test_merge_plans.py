"""Merge follows layer plans: sums of permuted experts, chosen and joined neurons, dropped experts, solved values.

Dimensions: D hidden size, F neurons of an expert.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.contracts.arrow import read_table
from stages.contracts.layer_plan import LayerPlan, Member, RouterRow, Slot, read_plan, write_plan
from stages.contracts.paths import CHECKPOINT_DIR, TENSORS_FILE, plan_file, replaced_file
from stages.contracts.tensors import write_tensors
from stages.contracts.units import Job
from stages.merge import blocks, slots
from stages.merge.layout import output_files
from stages.merge.spec import MergeArgs
from stages.merge.units import merge_unit
from stages.model.families import SUPPORTED
from stages.model.survey import survey_checkpoint
from stages.recombine.steps.held import HeldLayer
from stages.recombine.student import Student
from tests.runs import read_config, read_tensors, rewrite, tensor_bytes, token_ids
from tests.stages.test_quantised import CHECKPOINTS
from tests.tiny import NUM_EXPERTS, build, load, logits, save

EXPERTS = range(NUM_EXPERTS)
surveyed = lru_cache(survey_checkpoint)
Slots = Sequence[Slot]


def merged(
    source: Path, folder: Path, slots_of: Slots, export_format: str = "stock", solved: Mapping[str, Tensor] | None = None
) -> Path:
    """Merge a checkpoint by one plan for all layers. solved: values of replaced parameters, by the end of their names."""
    survey, rows = surveyed(str(source))
    write_tensors(folder / "survey" / TENSORS_FILE, rows)
    for layer in survey.moe_layers:
        named = {row.parameter: row for row in rows if row.layer == layer and row.role != "copy"}
        values = {name: value for name in named for end, value in (solved or {}).items() if name.endswith(end)}
        write_plan(plan_file(folder / "plans", layer), LayerPlan(layer, NUM_EXPERTS, tuple(slots_of), tuple(values)))
        if values:
            save_file(values, replaced_file(folder / "plans", layer))
    write_files(source, folder, dict.fromkeys(survey.moe_layers, len(slots_of)), export_format)
    checkpoint = folder / "merge" / CHECKPOINT_DIR
    return rewrite(checkpoint, read_tensors(checkpoint), read_config(source))


def write_files(source: Path, folder: Path, counts: dict[int, int], export_format: str) -> int:
    """Write all files of a target that is planned. Returns the bytes that were read."""
    _, rows = surveyed(str(source))
    num_read = 0
    for number, _ in enumerate(output_files(rows, NUM_EXPERTS, counts, export_format, 10**9, "float32")):
        args = MergeArgs(str(source), "survey", "plans", NUM_EXPERTS, counts, export_format, "float32", False, 10**9, 1, number)
        num_read += merge_unit(Job(folder, folder / "merge", args)).bytes_read
    return num_read


def num_neurons(source: Path) -> int:
    """F, of the first layer with experts."""
    _, rows = surveyed(str(source))
    row = next(row for row in rows if row.neuron_order == "single" and row.neuron_axis is not None)
    return row.shape[row.neuron_axis + (row.expert_axis is not None)]  # type: ignore[operator]


def order(seed: int, size: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).permutation(size).tolist())


def alone(expert: int, *members: Member, is_joined: bool = False) -> Slot:
    """A slot that only one expert's tokens go to."""
    return Slot((expert,), members, is_joined, row=RouterRow(((expert, 1.0),)))


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_neurons_in_another_order_compute_the_same_in_every_family(family: str, tmp_path: Path) -> None:
    """Permuted as they are, or as two parts that are joined. So where neurons lie, gates and ups too, is known everywhere."""
    source = save(build(family, torch.float32), tmp_path / "source")
    size = num_neurons(source)
    orders = {expert: order(expert, size) for expert in EXPERTS}
    permuted = [alone(expert, Member(expert, 1.0, orders[expert])) for expert in EXPERTS[::2]]
    parts = {expert: (orders[expert][: size // 3], orders[expert][size // 3 :]) for expert in EXPERTS[1::2]}
    joined = [alone(expert, *(Member(expert, 0.5, part) for part in parts[expert]), is_joined=True) for expert in parts]
    shuffled = merged(source, tmp_path, [slot for pair in zip(permuted, joined, strict=True) for slot in pair])
    before, after = read_tensors(source), read_tensors(shuffled)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    _, ids = token_ids(tmp_path)
    torch.testing.assert_close(logits(load(shuffled), ids), logits(load(source), ids), rtol=1e-4, atol=1e-4)


def test_halves_of_an_expert_joined_in_order_are_the_expert(mixtral: Path, tmp_path: Path) -> None:
    size = num_neurons(mixtral)
    halves = tuple(range(size // 3)), tuple(range(size // 3, size))
    joined = [alone(expert, *(Member(expert, 0.5, half) for half in halves), is_joined=True) for expert in EXPERTS]
    assert tensor_bytes(merged(mixtral, tmp_path, joined)) == tensor_bytes(mixtral)


@pytest.fixture
def mixtral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, and blocks that end in the middle of a row."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1016)
    return save(build("mixtral", torch.float32), tmp_path / "source")


def matrices(tensors: Mapping[str, Tensor], expert: int, layer: int = 1) -> list[Tensor]:
    """W_gate [F, D], W_up [F, D] and W_down [D, F] of mixtral."""
    return [tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"] for name in ("w1", "w3", "w2")]


def test_a_sum_of_permuted_experts_and_a_slot_of_neurons_of_three(mixtral: Path, tmp_path: Path) -> None:
    size = num_neurons(mixtral)
    orders = [order(seed, size) for seed in range(3)]
    summed = Slot((0, 1), (Member(0, 0.25, orders[0]), Member(1, 0.75, orders[1])), row=RouterRow(((0, 0.25), (1, 0.75))))
    some = [tuple(orders[2][begin::3]) for begin in range(3)]
    joined = Slot(
        (2, 3, 4), tuple(Member(expert, 1 / 3, chosen) for expert, chosen in zip((2, 3, 4), some, strict=True)), True,
        RouterRow(((3, 1.0),)),
    )  # fmt: skip
    doubled = Slot((7,), (Member(7, 2.0),), row=RouterRow(((7, 1.0),)))
    found = read_tensors(merged(mixtral, tmp_path, [summed, joined, doubled]))
    source = read_tensors(mixtral)
    for number, axis in enumerate((0, 0, 1)):
        one, other = (matrices(source, expert)[number].index_select(axis, torch.tensor(orders[expert])) for expert in (0, 1))
        torch.testing.assert_close(matrices(found, 0)[number], 0.25 * one + 0.75 * other)
        parts = [
            matrices(source, expert)[number].index_select(axis, torch.tensor(chosen))
            for expert, chosen in zip((2, 3, 4), some, strict=True)
        ]
        assert torch.equal(matrices(found, 1)[number], torch.cat(parts, dim=axis)), "joined neurons keep their bytes"
        assert torch.equal(matrices(found, 2)[number], 2 * matrices(source, 7)[number])
    router = "model.layers.1.block_sparse_moe.gate.weight"
    rows = source[router]
    torch.testing.assert_close(found[router], torch.stack([0.25 * rows[0] + 0.75 * rows[1], rows[3], rows[7]]))
    assert len([name for name in found if name.startswith("model.layers.1.") and name.endswith(".w1.weight")]) == 3


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe", "nemotron_h"])
def test_neurons_that_share_a_place_are_averaged_by_the_weights_of_their_members(family: str, tmp_path: Path) -> None:
    """Against a loop over neurons, in every layout, in the merged files and in recombine's layer; the bias of W_down is added
    up."""
    source = save(build(family, torch.float32), tmp_path / "source")
    size = num_neurons(source)
    chance = np.random.default_rng(0)
    places = {expert: (*range(size // 2), *chance.integers(0, size, size - size // 2).tolist()) for expert in (0, 1)}
    places[2] = tuple(chance.permutation(size).tolist())  # no place is empty
    weights = {0: 0.2, 1: 0.3, 2: 0.5}
    pooled = Slot(
        (0, 1, 2), tuple(Member(expert, weights[expert], places=places[expert]) for expert in range(3)),
        row=RouterRow(((0, 1.0),)),
    )  # fmt: skip
    slots_of = [pooled, *(alone(expert, Member(expert)) for expert in EXPERTS[3:])]
    found, before = read_tensors(merged(source, tmp_path, slots_of)), read_tensors(source)
    survey, rows = surveyed(str(source))
    layer = survey.moe_layers[0]
    tops = [row for row in rows if row.layer == layer and row.role in ("expert", "fused_expert") and row.expert in (None, 0)]
    for row in tops:
        old = [before[row.template.format(one)] if row.template else before[row.name][one] for one in range(3)]
        new = found[row.name] if row.template else found[row.name][0]
        if row.neuron_axis is None:
            due = sum(weights[one] * old[one] for one in range(3))
        else:
            due, axis = torch.zeros_like(old[0]), row.neuron_axis
            where = {"single": [(1, 0)], "halves": [(1, 0), (1, size)], "interleaved": [(2, 0), (2, 1)]}[row.neuron_order]
            for place in range(size):
                shared = [(one, n) for one in range(3) for n in range(size) if places[one][n] == place]
                total = sum(weights[one] for one, _ in shared)
                for step, begin in where:
                    for one, n in shared:
                        part = weights[one] / total * old[one].select(axis, step * n + begin)
                        due.select(axis, step * place + begin).add_(part)
        torch.testing.assert_close(new, due, msg=row.name)
        if not row.template:
            held = HeldLayer(Checkpoint(source), layer, layer + 1, 1, has_head=False)
            student = Student(held, layer, LayerPlan(layer, NUM_EXPERTS, tuple(slots_of)))
            ours = dict(student.weights.experts.named_parameters())[row.parameter.rsplit(".", 1)[-1]][0]
            torch.testing.assert_close(ours, due, msg=row.name)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "nemotron_h", "llama4_text"])
def test_experts_whose_neurons_are_permuted_copies_merge_to_one_that_computes_the_same(family: str, tmp_path: Path) -> None:
    """Fused, transposed, interleaved and with biases: the copy is made by a plan, and undone by the next one."""
    source = save(build(family, torch.float32), tmp_path / "source")
    size = num_neurons(source)
    forth = order(5, size)
    back = tuple(np.argsort(forth).tolist())
    copied = [alone(expert, Member(0, 1.0, forth) if expert == 1 else Member(expert)) for expert in EXPERTS]
    twins = merged(source, tmp_path / "twins", copied)
    pair = Slot((0, 1), (Member(0, 0.5), Member(1, 0.5, back)), row=RouterRow(((0, 1.0),)))
    slots_of = [pair, *(alone(expert, Member(expert)) for expert in EXPERTS[2:])]
    found, plain = read_tensors(merged(twins, tmp_path / "merged", slots_of)), read_tensors(source)
    survey, rows = surveyed(str(twins))
    of_experts = [row for row in rows if row.role in ("expert", "fused_expert") and row.layer == survey.moe_layers[0]]
    for row in of_experts:
        if row.expert not in (None, 0):
            continue
        mine = found[row.name] if row.expert is not None else found[row.name][0]
        torch.testing.assert_close(mine, plain[row.name] if row.expert is not None else plain[row.name][0])


@pytest.mark.parametrize("scheme", sorted(CHECKPOINTS))
def test_neurons_of_a_quantised_source_are_those_of_its_values(scheme: str, tmp_path: Path) -> None:
    quantised, plain = CHECKPOINTS[scheme](tmp_path)
    size = num_neurons(plain)
    some = order(3, size)
    slots_of = [
        Slot((0, 1), (Member(0, 0.5, order(1, size)), Member(1, 0.5)), row=RouterRow(((0, 1.0),))),
        Slot((2, 3), (Member(2, 0.5, some[: size // 2]), Member(3, 0.5, some[size // 2 :])), True, RouterRow(((2, 1.0),))),
        *(alone(expert, Member(expert)) for expert in EXPERTS[4:]),
    ]
    found, due = (read_tensors(merged(folder, tmp_path / folder.name, slots_of)) for folder in (quantised, plain))
    assert set(found) == set(due)
    assert all(torch.equal(found[name].to(due[name].dtype), due[name]) for name in due)


def test_what_is_read_in_memory_from_object_storage_has_the_same_bytes(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = num_neurons(mixtral)
    slots_of = [
        Slot((0, 1), (Member(0, 0.25, order(1, size)), Member(1, 0.75)), row=RouterRow(((0, 1.0),))),
        Slot((2, 3), (Member(2, 0.5, order(2, size)[:7]), Member(3, 0.5, order(3, size)[7:])), True, RouterRow(((2, 1.0),))),
    ]
    streamed = tensor_bytes(merged(mixtral, tmp_path / "streamed", slots_of))
    monkeypatch.setattr(slots, "is_remote", lambda _path: True)
    assert tensor_bytes(merged(mixtral, tmp_path / "in-memory", slots_of)) == streamed


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_solved_values_take_the_place_of_the_members(family: str, tmp_path: Path) -> None:
    """W_down of every slot and the rows of the router, in float32 whatever the checkpoint's dtype."""
    source = save(build(family, torch.bfloat16), tmp_path / "source")
    model = load(source)
    name, value = next((n, v) for n, v in model.state_dict().items() if n.endswith("experts.down_proj"))
    router = next(n for n, v in model.state_dict().items() if v.ndim == 2 and n.startswith(name.rsplit(".", 2)[0]))
    torch.manual_seed(0)
    down, rows = torch.randn(2, *value.shape[1:]), torch.randn(2, value.shape[1 if family == "mixtral" else 2])
    ends = {name.rsplit(".", 3)[-2] + ".down_proj": down, ".".join(router.rsplit(".", 2)[-2:]): rows}
    found = read_tensors(merged(source, tmp_path, [alone(0, Member(0)), alone(5, Member(5))], solved=ends))
    for number in range(2):
        mine = [tensor for name, tensor in found.items() if name.endswith(f"experts.{number}.w2.weight")]
        mine = mine or [tensor[number] for name, tensor in found.items() if name.endswith("experts.down_proj")]
        assert mine and all(torch.equal(tensor, down[number].bfloat16()) for tensor in mine)
    routers = [tensor for name, tensor in found.items() if name.endswith(("gate.weight", "router.weight"))]
    assert routers and all(torch.equal(tensor, rows.bfloat16()) for tensor in routers)


def test_dropped_experts_leave_no_tensor_and_no_tied_export(mixtral: Path, tmp_path: Path) -> None:
    kept = [Slot((expert,), (Member(expert),), row=RouterRow(((expert, 1.0),))) for expert in (1, 6)]
    found, source = read_tensors(merged(mixtral, tmp_path, kept)), read_tensors(mixtral)
    for slot, expert in enumerate((1, 6)):
        assert all(torch.equal(*pair) for pair in zip(matrices(found, slot), matrices(source, expert), strict=True))
    tied = [Slot(slot.experts, slot.members) for slot in kept]
    with pytest.raises(ValueError, match="the layer plan drops experts, which no tied export can express"):
        merged(mixtral, tmp_path / "tied", tied, "tied")


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (Slot((0,), (Member(0, 1.0, (0, 99)),), row=RouterRow(((0, 1.0),))), "the layer plan names neuron 99 of 48"),
        (Slot((0,), (Member(0, 1.0, (0, 1)),), row=RouterRow(((0, 1.0),))), "the layer plan fills 2 of 48 places of neurons"),
        (Slot((0,), (Member(0, 1.0, places=(0, 1)),), row=RouterRow(((0, 1.0),))), "the layer plan fills 2 of 48 places"),
    ],
)
def test_a_plan_that_does_not_fill_an_expert_is_refused(mixtral: Path, tmp_path: Path, slot: Slot, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merged(mixtral, tmp_path, [slot])


def test_plans_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    slots_of = (
        Slot((0, 2), (Member(0, 1 / 3), Member(2, 2 / 3)), row=RouterRow(((0, 0.1), (2, 0.9))), is_unweighted=True),
        Slot((), (Member(1, 1.0, (2, 0, 1)), Member(3, 0.5, (5,))), True, RouterRow(((1, 1.0),))),
    )
    plan = LayerPlan(7, 4, slots_of, ("layers.7.experts.down_proj",))
    write_plan(tmp_path / "plan", plan)
    assert read_plan(tmp_path / "plan") == plan
    assert "places" not in read_table(tmp_path / "plan").column_names
    placed = Slot((1, 3), (Member(1, 0.5, places=(2, 0, 1)), Member(3, 0.5, places=(0, 0, 1))), row=RouterRow(((1, 1.0),)))
    pooled = LayerPlan(7, 4, (slots_of[0], placed))
    write_plan(tmp_path / "pooled", pooled)
    assert read_plan(tmp_path / "pooled") == pooled
    assert plan.slot_E.tolist() == [0, -1, 0, -1]
    assert plan.unweighted_slots == (0,)


@pytest.mark.parametrize(
    ("slots_of", "message"),
    [
        ([Slot((4,), (Member(0),))], "slot 0 names expert 4; the source has experts 0 to 3"),
        ([Slot((0,), (Member(0, float("nan")),))], "slot 0 has a weight that is not finite"),
        ([Slot((0,), ())], "slot 0 has no members"),
        ([Slot((0,), (Member(0, 1.0, (1,)), Member(1, 1.0, (0, 1))))], "adds up members with different numbers of neurons"),
        ([Slot((0,), (Member(0, 1.0, places=(0, 2)),))], "slot 0 leaves a place of its neurons empty; fill all from 0 to 2"),
        ([Slot((0,), (Member(0, 1.0, places=(0, 1)), Member(1)))], "slot 0 has places for some members only"),
        ([Slot((0,), (Member(0, 0.0, places=(0, 1)),))], "slot 0 averages neurons by weights that are not positive"),
        ([Slot((0,), (Member(0),)), Slot((0,), (Member(1),))], "an expert belongs to two slots"),
        ([Slot((0,), (Member(0),)), Slot((1,), (Member(1),), row=RouterRow(((1, 1.0),)))], "in all of them or in none"),
        ([], "it needs slots"),
    ],
)
def test_a_plan_that_no_checkpoint_can_express_is_refused(slots_of: Slots, message: str) -> None:
    with pytest.raises(ValueError, match=rf"layer plan of layer 2: .*{message}"):
        LayerPlan(2, 4, tuple(slots_of))


def test_bytes_that_are_read_are_those_of_the_members(mixtral: Path, tmp_path: Path) -> None:
    """A dropped expert is not read, fused or not."""
    fused = save(build("mixtral", torch.float32), tmp_path / "fused", save_original_format=False)
    for source in (mixtral, fused):
        folder = tmp_path / f"run-{source.name}"
        merged(source, folder, [alone(expert, Member(expert)) for expert in (1, 6)])
        survey, rows = surveyed(str(source))
        num_read = write_files(source, folder, dict.fromkeys(survey.moe_layers, 2), "stock")
        of_experts = sum(row.num_bytes for row in rows if row.role in ("expert", "fused_expert"))
        assert num_read == Checkpoint(source).total_bytes - of_experts + of_experts * 2 // NUM_EXPERTS
