"""The step solve: W_down of a layer's slots with the neurons that they have chosen; and plans that stay as they are.

Dimensions: R tokens that are routed to a slot, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from stages.contracts.layer_plan import LayerPlan, read_plan, write_plan
from stages.contracts.paths import plan_file, replaced_file
from stages.contracts.units import HeldJob, Job, NoFacts, UnitResult
from stages.io.files import WrittenFile
from stages.recombine.calls import OWN, KeepArgs, SolveArgs, SolveFacts
from stages.recombine.given import Given, read_chosen, save_tensors
from stages.recombine.neurons import chosen_slot
from stages.recombine.router_step import moved
from stages.recombine.solve import Problem, Solution, error_of_start, solve
from stages.recombine.steps.held import HeldLayer, plan_of
from stages.recombine.steps.passing import plain_routers, routed_by
from stages.recombine.student import Student


def solve_unit(job: HeldJob[SolveArgs, HeldLayer]) -> UnitResult[SolveFacts]:
    """Solve W_down of a layer's slots; write the plan with what it replaces. Of several plans, that with the least error.

    The target is what the source's stream is after the layer, less what the student's is there without its experts.
    """
    args, of = job.args, job.args.of
    with torch.inference_mode():
        found = {name: _solved(job, name) for name in args.names}
    name = min(found, key=lambda one: found[one].error)
    best, total = found[name], found[OWN].solution.total_unseen
    compared = tuple((one, solved.error / total) for one, solved in found.items())
    facts = SolveFacts(
        of.layer, best.solution.ridge, best.error_before, best.solution.error_after, best.is_fitted,
        best.num_columns <= args.bounds.joint_columns, *((name, compared) if len(args.names) > 1 else ()),
    )  # fmt: skip
    return UnitResult(facts, _write(job.part_dir, best.plan, best.values))


@dataclass(frozen=True)
class _Solved:
    """A plan whose neurons are chosen, what solves it, and what it replaces, by parameter. error_before: of the plan as it was.
    is_fitted: its router rows are. num_columns: that were solved for."""

    plan: LayerPlan
    solution: Solution
    values: Mapping[str, Tensor]
    error_before: float
    is_fitted: bool
    num_columns: int

    @property
    def error(self) -> float:
        """Squared error of the layer's output on the tokens that nothing has seen."""
        return self.solution.error_unseen * self.solution.total_unseen


def _solved(job: HeldJob[SolveArgs, HeldLayer], name: str) -> _Solved:
    """A plan with its chosen neurons, its rows and W_down."""
    args, of, shard = job.args, job.args.of, job.held
    given, rows, weights, before = shard.given(job.part_dir, of), dict[str, Tensor](), None, None
    shard.free_plans()
    if args.has_start:
        start = shard.start(job.part_dir, name)
        given = replace(given, routed=start.routed, router_logits=start.router_logits)
        plan, rows, before = start.plan, dict(start.rows), start.error_before
    else:
        plan = plan_of(job, of, name)
    size = shard.expert_weights(of.layer).intermediate
    if args.num_neurons is not None and _has_to_choose(plan, size, args.num_neurons):
        found = read_chosen(job.part_dir, of.layer, name, len(plan.slots), shard.device)
        slots = tuple(chosen_slot(slot, one, size) for slot, one in zip(plan.slots, found, strict=True))
        weights, plan = [one.weight_DK for one in found], replace(plan, slots=slots)
    student = Student(shard, of.layer, plan, rows)
    problem = given.problem(student, of.has_shared, weights)
    if of.score is not None and (moved_rows := _moved_rows(of.score, student, given, problem)):
        other = Student(shard, of.layer, plan, moved_rows, like=student)
        again = routed_by(other, given).problem(other, of.has_shared, weights)
        if error_of_start(again, is_unseen=True) < error_of_start(problem, is_unseen=True):
            rows, problem = moved_rows, again
    solution = solve(problem, args.ridge, args.bounds)
    before = solution.error_before if before is None else before
    values = {student.down_name: student.stacked(solution.weights[: len(plan.slots)]), **rows}
    for weight in solution.weights[len(plan.slots) :]:
        values[student.shared_name] = weight
    return _Solved(plan, solution, values, before, bool(rows), sum(weight.shape[1] for weight in problem.start))


def _has_to_choose(plan: LayerPlan, size: int, num_neurons: int) -> bool:
    """Whether a slot has more candidates than it keeps. size: neurons of an expert of the source."""
    return num_neurons < size or any(len(slot.members) > 1 for slot in plan.slots)


def _moved_rows(score: str, student: Student, given: Given, problem: Problem) -> dict[str, Tensor]:
    """Router rows after a step towards the layer's output; none where the router is more than a matrix."""
    routers = plain_routers(student, given)
    if routers is None or given.router_x is None or given.router_logits is None:
        return {}
    num_slots = student.weights.num_experts
    bias = student.weights.bias("down_proj", 0, num_slots)
    bias_SD = None if bias is None else bias.view(num_slots, -1)
    return moved(score, problem, bias_SD, routers[1], given.router_x, given.router_logits)


def _write(part_dir: Path, plan: LayerPlan, values: Mapping[str, Tensor]) -> list[WrittenFile]:
    held = {name: value.float() for name, value in values.items()}
    solved = save_tensors(replaced_file(part_dir, plan.layer), held)
    return [solved, write_plan(plan_file(part_dir, plan.layer), replace(plan, replaced=(*plan.replaced, *held)))]


def keep_unit(job: Job[KeepArgs]) -> UnitResult[NoFacts]:
    """Write the plan of a layer that loses nothing as it is: the source's bytes are kept."""
    layer = job.args.layer
    plan = read_plan(plan_file(job.run_dir / job.args.plan_dir, layer))
    return UnitResult(NoFacts(), [write_plan(plan_file(job.part_dir, layer), plan)])
