"""The step compare: what slots lose that experts share.

Dimensions: N sampled tokens, T tokens, E experts of the source.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from stages.contracts.paths import pairs_file
from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.model.experts_forward import ExpertsForward
from stages.recombine.calls import OWN, SAMPLED, CompareArgs, LayerArgs, PairArgs
from stages.recombine.given import Given, save_tensors
from stages.recombine.pairs import GroupLosses, Routed
from stages.recombine.solve import held_tokens
from stages.recombine.steps.held import HeldLayer, plan_of
from stages.recombine.steps.passing import plain_routers
from stages.recombine.student import Student


def compare_unit(job: HeldJob[CompareArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """What a slot loses that an expert shares with each later one of its run."""
    args, of, shard = job.args, job.args.of, job.held
    with torch.inference_mode():
        plan = plan_of(job, of, OWN)
        if shard.losses is None or shard.losses[0] != job.part_dir:
            student, given = shard.planned(job.part_dir, OWN, plan), shard.given(job.part_dir, of)
            source = ExpertsForward(shard.expert_weights(of.layer))
            shard.losses = job.part_dir, losses_of(of, args.pairs, student, given, source)[0]
        size = plan.num_experts // args.pairs.num_runs
        later = range(args.expert + 1, (args.expert // size + 1) * size)
        found = torch.tensor(shard.losses[1].of_pairs(args.expert, later), dtype=torch.float64)
    written = save_tensors(pairs_file(job.part_dir, of.layer, args.expert), {"losses": found})
    return UnitResult(NoFacts(), transient=(written,))


def losses_of(
    of: LayerArgs,
    pairs: PairArgs,
    student: Student,
    given: Given,
    source: ExpertsForward,
    known: Mapping[tuple[int, ...], float] = MappingProxyType({}),
) -> tuple[GroupLosses, Tensor]:
    """The losses of groups of experts on a sample of the tokens, and how many of these each expert gets [E]."""
    tokens_T = (~held_tokens(given.lengths, given.x_TD.device)).nonzero().flatten()
    tokens_N = tokens_T[torch.linspace(0, len(tokens_T) - 1, min(SAMPLED, len(tokens_T))).long()]
    x_ND = given.x_TD[tokens_N]
    routed = Routed(x_ND, gate_NE := student.source_routing(x_ND), given.weight_T[tokens_N])
    routers = plain_routers(student, given) if of.score is not None else None
    if routers is not None:
        ones = [x_ND.new_ones(len(x_ND), 1)] if routers[0].bias is not None else []
        columns_NX = torch.cat([x_ND, *ones], dim=1)
        routed = replace(routed, score=of.score, logit_NE=routers[0].logits(x_ND), column_NX=columns_NX)
    num_partners = gate_NE.shape[1] // pairs.num_runs - 1
    return GroupLosses(source, routed, given.place, num_partners, known), (gate_NE != 0).sum(0)
