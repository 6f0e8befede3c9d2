"""The step choose: which neurons a slot keeps.

Dimensions: R tokens that are routed to a slot, D hidden size, F neurons of an expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.contracts.layer_plan import Slot
from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.model.experts_forward import ExpertsForward
from stages.recombine.calls import ChooseArgs
from stages.recombine.given import Given, write_chosen
from stages.recombine.neurons import SourceExperts, chosen
from stages.recombine.steps.held import HeldLayer
from stages.recombine.student import Student


def choose_unit(job: HeldJob[ChooseArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """Choose the neurons of a slot."""
    args, of, shard = job.args, job.args.of, job.held
    with torch.inference_mode():
        start, given = shard.start(job.part_dir, args.name), shard.given(job.part_dir, of)
        problem = shard.problem(job.part_dir, of, args.name)
        slot = largest_first(start.plan.slots, [len(one.tokens_R) for one in problem.slots])[args.rank]
        found = chosen(
            start.plan.slots[slot], problem, slot,
            _source_experts(ExpertsForward(shard.expert_weights(of.layer)), shard.started(job.part_dir, args.name), given),
            args.num_neurons, args.choice_columns,
        )  # fmt: skip
    return UnitResult(NoFacts(), transient=(write_chosen(job.part_dir, of.layer, args.name, args.rank, slot, found),))


def largest_first(slots: Sequence[Slot], num_tokens: Sequence[int]) -> list[int]:
    """Numbers of the slots by what a choice costs, about tokens times the square of the candidates; of equals, in order."""
    return sorted(range(len(slots)), key=lambda slot: (-num_tokens[slot] * len(slots[slot].members) ** 2, slot))


def _source_experts(source: ExpertsForward, student: Student, given: Given) -> SourceExperts:
    def outputs(expert: int, a_RF: Tensor) -> Tensor:
        bias_D = source.weights.bias("down_proj", expert, expert + 1)
        output_RD = source.outputs_from(a_RF, expert)
        return output_RD if bias_D is None else output_RD - bias_D

    return SourceExperts(
        lambda expert, tokens_R: source.activations_of(given.x_TD, tokens_R, expert),
        outputs,
        lambda tokens_R: student.source_routing(given.x_TD[tokens_R]),
        source.weights.down_square_norms,
    )
