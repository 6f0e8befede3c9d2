"""The step choose: which neurons a slot keeps."""

import torch

from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.model.experts_forward import ExpertsForward
from stages.recombine.calls import ChooseArgs
from stages.recombine.given import write_chosen
from stages.recombine.neurons import chosen
from stages.recombine.steps.held import HeldLayer


def choose_unit(job: HeldJob[ChooseArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """Choose the neurons of a slot."""
    args, of, shard = job.args, job.args.of, job.held
    with torch.inference_mode():
        start, given = shard.start(job.part_dir, args.name), shard.given(job.part_dir, of)
        source = ExpertsForward(shard.expert_weights(of.layer))
        assert start.left_TD is not None
        found = chosen(
            start.plan.slots[args.slot],
            shard.problem(job.part_dir, of, args.name),
            args.slot,
            start.left_TD,
            lambda expert, tokens_R: source.activations_of(given.x_TD, tokens_R, expert),
            source.weights.down_square_norms,
            args.num_neurons,
        )
    return UnitResult(NoFacts(), transient=(write_chosen(job.part_dir, of.layer, args.name, args.slot, found),))
