"""The step start: the pairs of a plan and the rows of its router, before anything is solved."""

import torch
from torch import Tensor

from stages.contracts.layer_plan import LayerPlan
from stages.contracts.paths import pairs_file
from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.model.experts_forward import ExpertsForward
from stages.recombine.calls import OWN, PairArgs, StartArgs
from stages.recombine.given import Given, Start, load_tensors
from stages.recombine.pairs import paired_plan
from stages.recombine.router import fitted
from stages.recombine.solve import error_of_start
from stages.recombine.steps.compare import losses_of
from stages.recombine.steps.held import HeldLayer, plan_of
from stages.recombine.steps.passing import plain_routers, routed_by
from stages.recombine.student import Student


def start_unit(job: HeldJob[StartArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """Choose the pairs of a plan anew, if they are, and fit rows of its router, where these leave less on held-out tokens than
    the plan's own do, before anything is solved."""
    args, of, shard = job.args, job.args.of, job.held
    plan = plan_of(job, of, args.name)
    with torch.inference_mode():
        student, given = shard.planned(job.part_dir, args.name, plan), shard.given(job.part_dir, of)
        if args.name != OWN:
            given = routed_by(student, given)
        if args.pairs is not None and len(plan.slots) < plan.num_experts:
            plan = _paired(job, args.pairs, student, plan, given)
            student = Student(shard, of.layer, plan)
            given = routed_by(student, given)
        problem, rows = given.problem(student, of.has_shared), dict[str, Tensor]()
        before = error_of_start(problem)
        if of.score is not None and (found := _fitted_rows(of.score, student, plan, given)):
            other = routed_by(Student(shard, of.layer, plan, found, like=student), given)
            again = other.problem(student, of.has_shared)
            if error_of_start(again, is_unseen=True) < error_of_start(problem, is_unseen=True):
                rows, given = found, other
        start = Start(plan, before, rows, given.routed, given.router_logits)
        return UnitResult(NoFacts(), transient=start.write(job.part_dir, args.name))


def _paired(job: HeldJob[StartArgs, HeldLayer], pairs: PairArgs, student: Student, plan: LayerPlan, given: Given) -> LayerPlan:
    """The plan with the pairs of experts that lose least on a sample of the tokens. given: under the plan's router."""
    of, size = job.args.of, plan.num_experts // pairs.num_runs
    known: dict[tuple[int, ...], float] = {}
    for expert in range(plan.num_experts):
        if (expert + 1) % size:
            found = load_tensors(pairs_file(job.part_dir, of.layer, expert))["losses"].tolist()
            known |= {(expert, other): loss for other, loss in enumerate(found, expert + 1)}
    losses, used_E = losses_of(of, pairs, student, given, ExpertsForward(job.held.expert_weights(of.layer)), known)
    return paired_plan(plan, losses, used_E, pairs.num_runs)


def _fitted_rows(score: str, student: Student, plan: LayerPlan, given: Given) -> dict[str, Tensor]:
    """Router rows for the slots of a stock plan, by parameter; none where there is nothing to fit: every slot gets the tokens
    of one expert, or the family's router is more than a matrix."""
    routers = plain_routers(student, given) if any(len(slot.experts) > 1 for slot in plan.slots) else None
    if routers is None or given.router_x is None:
        return {}
    return fitted(score, *routers, given.router_x, [slot.experts for slot in plan.slots])
