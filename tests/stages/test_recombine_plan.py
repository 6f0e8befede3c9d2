"""What `plan` says of a refit: work, memory, tokens, and how it is solved."""

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.checks import check
from pipeline.commands.plan import describe_plan
from pipeline.run.view import RunView
from stages.contracts.settings import RunConfig
from stages.model.survey import survey_checkpoint
from stages.recombine.calls import JOINT_COLUMNS, SWEEPS, moment_bytes
from stages.recombine.needs import NUM_RIDGES, layer_needs, target_flops
from tests.runs import run_config, token_ids
from tests.tiny import build, save


def view_of(config: RunConfig) -> RunView:
    return RunView(config, check(config).inputs, surveyed=survey_checkpoint(config.model))


def test_plan_says_that_best_solves_several_plans_and_what_of_a_shared_expert_is_solved(tmp_path: Path) -> None:
    """qwen2_moe: slots of 24 neurons, a shared expert of 40. 64 tokens, two of eight experts each, four slots."""
    source = save(build("qwen2_moe", torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    config = run_config(source, tmp_path / "run", path, [4], ["tied", "stock"], variants=["recombine", "best"])
    lines = {line.split(":")[0].strip(): line for line in map(str, describe_plan(config)) if "W_down is solved" in line}
    view = view_of(config)
    flops = {target.part: target_flops(view, target) for target in view.targets}
    memory = {target.part: layer_needs(view, target).solve_bytes for target in view.targets}
    assert len(lines) == 4
    for export_format, num_plans in (("tied", 2), ("stock", 4)):
        one, best = f"recombine-4e-{export_format}", f"best-4e-{export_format}"
        for part in (one, best):
            line = next(line for name, line in lines.items() if name.endswith(part))
            assert "136 columns of 4 slots and a shared expert of 40 neurons, 1.3 tokens each" in line, line
        times = flops[best] / flops[one]
        assert 1.3 < times < num_plans and memory[best] > memory[one]
        assert f"as {num_plans} plans of each layer are solved and the best is taken ({times:.1f} times one plan's)" in line, (
            line
        )
        assert "plans of each layer" not in next(line for name, line in lines.items() if name.endswith(one))


def test_plan_says_what_one_worker_does_alone(tmp_path: Path) -> None:
    """A solution, in sequential; in one shot, layers are solved beside each other."""
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    for mode, is_alone in (("sequential", True), ("one_shot", False)):
        refit = {"mode": mode, "neurons": "choose"}
        config = run_config(source, tmp_path / "run", path, [4], ["tied"], refit=refit)
        view = view_of(config)
        needs, (target,) = layer_needs(view, view.targets[0]), view.targets
        alone = len(view.survey.moe_layers) * sum(sum(one) for one in (needs.solve_work(SWEEPS, NUM_RIDGES), needs.start_work))
        assert 0 < alone < target_flops(view, target)
        (line,) = (line for line in map(str, describe_plan(config)) if "W_down is solved" in line)
        said = f"n workers, an n-th of all but {alone / target_flops(view, target):.0%}, which one does alone"
        assert (said if is_alone else "n workers, an n-th of it; ") in line, line


def test_a_shared_expert_and_the_routers_step_are_counted(tmp_path: Path) -> None:
    source = save(build("qwen2_moe", torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    view = view_of(run_config(source, tmp_path / "run", path, [4], ["stock"], variants=["recombine"]))
    needs = layer_needs(view, view.targets[0])
    joint = replace(needs.bounds, joint_columns=needs.columns)
    assert (needs.shared, needs.columns) == (40, 4 * 24 + 40)
    assert replace(needs, bounds=joint).is_joint and not replace(needs, bounds=joint, shared=41).is_joint
    assert needs.moment_bytes > replace(needs, shared=0, is_fitted=False).moment_bytes
    assert sum(needs.solve_work(1, 0)) > sum(replace(needs, shared=0).solve_work(1, 0))
    unknowns = 4 * needs.hidden_size
    assert needs.router_unknowns == unknowns and sum(needs.router_work) > unknowns**3 / 3
    assert needs.moment_bytes >= moment_bytes(unknowns)
    for other in (replace(needs, is_fitted=False), replace(needs, hidden_size=JOINT_COLUMNS)):
        assert other.router_unknowns == 0 and sum(other.router_work) == 0


def test_plan_warns_of_little_text_and_of_little_memory(tmp_path: Path) -> None:
    """64 tokens, two of eight experts each: a third of a token for each of 48 neurons."""
    source = save(build("mixtral", torch.float32), tmp_path / "source")
    path, _ = token_ids(tmp_path)
    refit, small = {"mode": "sequential", "neurons": "choose"}, {"worker_memory": "128 kB"}
    lines = [str(line) for line in describe_plan(run_config(source, tmp_path / "run", path, [4], ["tied"], refit=refit))]
    (few,) = (line for line in lines if line.startswith("few tokens"))
    assert few.startswith("few tokens   0.3 calibration tokens for each neuron") and "num_sequences to 240 for 20" in few
    assert not [line for line in lines if line.startswith("memory  ")]
    for changes in ({"refit": {"mode": "sequential"}, "resources": small}, {"refit": refit, "resources": small}):
        lines = [str(line) for line in describe_plan(run_config(source, tmp_path / "run", path, [4], ["tied"], **changes))]
        (memory,) = (line for line in lines if line.startswith("memory  "))
        assert "4e-tied: solving a layer takes about" in memory and "more than resources.worker_memory, 128.0 kB" in memory
        assert len([line for line in lines if line.startswith("few tokens")]) == ("neurons" in changes["refit"])
        chooses = [line for line in lines if "a slot chooses 48 of 51 neurons (of 84 with more worker_memory); " in line]
        assert len(chooses) == ("neurons" in changes["refit"]), lines
    whole = run_config(source, tmp_path / "run", path, [8], ["tied"], refit=refit, resources=small)
    assert not [line for line in map(str, describe_plan(whole)) if line.startswith(("few tokens", "memory  "))]
