"""Units of recombine: the solution of a layer, and a token shard through it.

Dimensions: B sequences of a micro-batch, T tokens of all token shards, D hidden size, k experts a token, S slots.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from stages.checkpoint.folder import Checkpoint
from stages.contracts.layer_plan import LayerPlan, read_plan, write_plan
from stages.contracts.paths import hidden_file, plan_file, replaced_file, student_file, tokens_file
from stages.contracts.stream_units import LayerShardArgs
from stages.contracts.units import HeldJob, Job, NoFacts, UnitResult
from stages.io.files import WrittenFile, write_bytes
from stages.io.storage import is_remote
from stages.model.experts_forward import ExpertsForward
from stages.model.layer_shard import LayerShard
from stages.model.stream import read_hidden, read_token_ids, write_hidden
from stages.recombine.neurons import chosen_plan
from stages.recombine.router import fitted
from stages.recombine.solve import Problem, SlotTokens, solve
from stages.recombine.spec import AdvanceArgs, KeepArgs, SolveArgs, SolveFacts
from stages.recombine.student import Student, output_scale


class HeldLayer(LayerShard):
    """One decoder layer of the source, and the student's in the same place once it is solved."""

    _student: Student | None = None

    def close(self) -> None:
        """Free all weights."""
        self._student = None
        super().close()

    def solved(self, part_dir: Path) -> Student:
        """The layer with the solved W_down of the part for which it is held."""
        if self._student is None:
            path = replaced_file(part_dir, self.first)
            values = load(path.read_bytes()) if is_remote(path) else load_file(path)
            rows = {name: value for name, value in values.items() if not name.endswith(".down_proj")}
            student = Student(self, self.first, read_plan(plan_file(part_dir, self.first)), rows)
            student.set_down(values[student.down_name])
            self._student = student
        return self._student


def open_layer(args: LayerShardArgs) -> HeldLayer:
    """Load one decoder layer."""
    return HeldLayer(Checkpoint(args.model), args.first, args.stop, args.num_threads, has_head=False)


@dataclass(frozen=True)
class _Gathered:
    """What the experts of a layer are given, and have to give: input x_TD, slots and gates of every token, the target with the
    outputs' biases, float32 [T, D], and the weight of each token. router_x, router_logits: what the router of a stock plan is
    given and gives, in pieces."""

    x_TD: Tensor
    slots: list[SlotTokens]
    target_TD: Tensor
    weight_T: Tensor
    place: str
    sequence_length: int
    router_x: list[Tensor]
    router_logits: list[Tensor]

    def problem(self, student: Student, start: Sequence[Tensor] | None = None) -> Problem:
        """To be solved for a student's slots. start: W_down of each, instead of what they have."""
        target_TD = self.target_TD.clone()
        for number, slot in enumerate(self.slots):
            bias_D = student.weights.bias("down_proj", number, number + 1)
            if bias_D is not None:
                target_TD.index_add_(0, slot.tokens_R, -slot.gates_R[:, None] * bias_D.float())
        return Problem(
            self.slots,
            lambda number, tokens_R: student.forward.activations_of(self.x_TD, tokens_R, number),
            target_TD,
            self.weight_T,
            start or [student.down(number) for number in range(student.weights.num_experts)],
            self.place,
            self.sequence_length,
        )


def solve_unit(job: HeldJob[SolveArgs, HeldLayer]) -> UnitResult[SolveFacts]:
    """Solve W_down of a layer's slots; write the plan with what it replaces.

    The target is what the source's stream is after the layer, less what the student's is there without its experts.
    """
    args, shard, layer = job.args, job.held, job.args.layer
    plan = read_plan(plan_file(job.run_dir / args.plan_dir, layer))
    with torch.inference_mode():
        student = Student(shard, layer, plan)
        gathered = _gathered(job, student)
        solution = solve(problem := gathered.problem(student), args.ridge)
        rows: dict[str, Tensor] = {}
        if args.score is not None and (found := _fitted_rows(args.score, student, plan, gathered)):
            other = Student(shard, layer, plan, found)
            again = _gathered(job, other)
            better = solve(other_problem := again.problem(other), args.ridge)
            if better.error_unseen < solution.error_unseen:
                rows, gathered, problem = found, again, other_problem
                solution = replace(better, error_before=solution.error_before)
        if args.num_neurons is not None and _has_to_choose(plan, student, args.num_neurons):
            source = ExpertsForward(shard.expert_weights(layer))

            def activations(expert: int, tokens_R: Tensor) -> Tensor:
                return source.activations_of(gathered.x_TD, tokens_R, expert)

            plan, start = chosen_plan(plan, problem, solution.weights, activations, args.num_neurons)
            before = solution.error_before
            student = Student(shard, layer, plan, rows)
            solution = replace(solve(gathered.problem(student, start), args.ridge), error_before=before)
        files = _write(job.part_dir, plan, {student.down_name: student.stacked(solution.weights), **rows})
    facts = SolveFacts(layer, solution.ridge, solution.error_before, solution.error_after, bool(rows))
    return UnitResult(facts, files)


def keep_unit(job: Job[KeepArgs]) -> UnitResult[NoFacts]:
    """Write the plan of a layer that loses nothing as it is: the source's bytes are kept."""
    layer = job.args.layer
    plan = read_plan(plan_file(job.run_dir / job.args.plan_dir, layer))
    return UnitResult(NoFacts(), [write_plan(plan_file(job.part_dir, layer), plan)])


def _has_to_choose(plan: LayerPlan, student: Student, num_neurons: int) -> bool:
    """Whether a slot has more candidates than it keeps."""
    return num_neurons < student.weights.intermediate or any(len(slot.members) > 1 for slot in plan.slots)


def _fitted_rows(score: str, student: Student, plan: LayerPlan, gathered: _Gathered) -> dict[str, Tensor]:
    """Router rows for the slots of a stock plan, by parameter; none where there is nothing to fit: every slot gets the tokens
    of one expert, or the family's router is more than a matrix."""
    routers = student.routers() if any(len(slot.experts) > 1 for slot in plan.slots) else None
    if routers is None or not gathered.router_x:
        return {}
    source, start, _ = routers
    x_TD, logits_TS = torch.cat(gathered.router_x), torch.cat(gathered.router_logits)
    if not start.gives(x_TD, logits_TS):
        return {}
    return fitted(score, source, start, x_TD, [slot.experts for slot in plan.slots])


def _write(part_dir: Path, plan: LayerPlan, values: Mapping[str, Tensor]) -> list[WrittenFile]:
    held = {name: value.float().cpu().contiguous() for name, value in values.items()}
    solved = write_bytes(replaced_file(part_dir, plan.layer), save(held))
    return [solved, write_plan(plan_file(part_dir, plan.layer), replace(plan, replaced=(*plan.replaced, *held)))]


def _gathered(job: HeldJob[SolveArgs, HeldLayer], student: Student) -> _Gathered:
    """Send both streams of all token shards through the layer, the student's without its experts."""
    args, shard, place = job.args, job.held, f"layer {job.args.layer}"
    xs, routed, targets, norms = list[Tensor](), list[tuple[Tensor, Tensor]](), list[Tensor](), list[Tensor]()
    scale: float | None = None
    router_x, router_logits = list[Tensor](), list[Tensor]()
    for number in range(args.num_shards):
        ids = list(read_token_ids(job.run_dir / args.tokens_dir / tokens_file(number)).split(args.micro_batch))
        source, ours = _streams(job.part_dir, shard, args.layer, number, ids, args.is_one_shot)
        for source_BTD, ours_BTD in zip(source, ours, strict=True):
            after_BTD = shard.run_layer(args.layer, source_BTD)

            def see(x_TD: Tensor, slots_Tk: Tensor, gates_Tk: Tensor) -> Tensor:
                xs.append(x_TD)
                routed.append((slots_Tk, gates_Tk))
                return torch.zeros_like(x_TD)

            with student.watched_router(router_x, router_logits) if args.score is not None else nullcontext():
                bare_BTD = student.run(ours_BTD, see)
            if scale is None:
                output_TD = student.outputs(xs[0], *routed[0])
                whole_BTD = student.run(ours_BTD, lambda *routed, given=output_TD: given)
                scale = output_scale(bare_BTD.flatten(0, 1).float(), whole_BTD.flatten(0, 1).float(), output_TD, place)
            targets.append((after_BTD.float() - bare_BTD.float()).flatten(0, 1) / scale)
            norms.append(after_BTD.float().square().mean(-1).sqrt().flatten())
    weight_T = 1 / torch.cat(norms).clamp(min=1e-12)
    slots_Tk, gates_Tk = (torch.cat(parts) for parts in zip(*routed, strict=True))
    slots = _slot_tokens(slots_Tk, gates_Tk.float(), student.weights.num_experts)
    length = ids[0].shape[1]
    return _Gathered(
        torch.cat(xs), slots, torch.cat(targets), weight_T / weight_T.mean(), place, length, router_x, router_logits
    )


def _slot_tokens(slots_Tk: Tensor, gates_Tk: Tensor, num_slots: int) -> list[SlotTokens]:
    """Tokens of each slot with the sum of their gates: two experts of a token may share a slot."""
    gate_TS = torch.zeros(len(slots_Tk), num_slots, device=slots_Tk.device).scatter_add_(1, slots_Tk, gates_Tk)
    tokens = [gate_TS[:, number].nonzero().flatten() for number in range(num_slots)]
    return [SlotTokens(tokens_R, gate_TS[tokens_R, number]) for number, tokens_R in enumerate(tokens)]


def _streams(
    part_dir: Path, shard: LayerShard, layer: int, number: int, ids: list[Tensor], is_one_shot: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states of the source and of the student as they enter a layer, by micro-batch; the source's twice in one shot."""
    source = read_hidden(shard, ids, hidden_file(part_dir, layer, number) if layer else None)
    if layer == 0 or is_one_shot:
        return source, source
    return source, read_hidden(shard, ids, student_file(part_dir, layer, number))


def advance_unit(job: HeldJob[AdvanceArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """Send a token shard through a layer: the source's, and the student's as it is solved. All that it writes is transient."""
    args, shard = job.args, job.held
    ids = list(read_token_ids(job.run_dir / args.tokens_dir / tokens_file(args.shard)).split(args.micro_batch))
    source, ours = _streams(job.part_dir, shard, args.layer, args.shard, ids, args.is_one_shot)
    after = [shard.run_layer(args.layer, hidden) for hidden in source]
    written = write_hidden(hidden_file(job.part_dir, args.layer + 1, args.shard), after)
    if args.is_one_shot:
        return UnitResult(NoFacts(), transient=(written,))
    if args.has_plan:
        with torch.inference_mode():
            student = shard.solved(job.part_dir)
            behind = [student.run(hidden, student.outputs) for hidden in ours]
    else:
        behind = [shard.run_layer(args.layer, hidden) for hidden in ours]
    student_written = write_hidden(student_file(job.part_dir, args.layer + 1, args.shard), behind)
    return UnitResult(NoFacts(), transient=(written, student_written))
