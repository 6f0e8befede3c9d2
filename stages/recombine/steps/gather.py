"""The step gather: the student's stream of a token shard as it leaves a layer without its experts, and what it lacks there.

Dimensions: B sequences of a micro-batch, T tokens, D hidden size.
"""

import math

import torch
from torch import Tensor

from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.recombine.calls import OWN, GatherArgs, LayerArgs
from stages.recombine.given import GivenShard
from stages.recombine.steps.held import HeldLayer, plan_of
from stages.recombine.steps.passing import Passed, entering, ids_of, passed_through
from stages.recombine.student import Student, output_scale


def gather_unit(job: HeldJob[GatherArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """Send the student's stream of a token shard through the layer without its experts; keep what the source's has more."""
    args, of, shard = job.args, job.args.of, job.held
    with torch.inference_mode():
        student = shard.planned(job.part_dir, OWN, plan_of(job, of, OWN))
        ids = ids_of(job, args)
        ours = entering(job.part_dir, shard, of.layer, args.shard, ids, is_source=of.is_one_shot)
        after = entering(job.part_dir, shard, of.layer + 1, args.shard, ids, is_source=True)
        passed = passed_through(student, of, ids, ours)
        added, norms = list[Tensor](), list[Tensor]()
        for after_BTD, bare_BTD, is_token_T in zip(after, passed.bare, passed.is_token, strict=True):
            added.append((after_BTD.float() - bare_BTD.float()).flatten(0, 1)[is_token_T])
            norms.append(after_BTD.float().square().mean(-1).sqrt().flatten()[is_token_T])
        factor = of.shard_weights[args.shard] if of.shard_weights else 1.0
        scale = None if args.shard else _scale(student, of, ours[0], passed)
        router = (torch.cat(passed.router_x), torch.cat(passed.router_logits)) if passed.router_x else (None, None)
        shard_given = GivenShard(
            torch.cat(passed.x), torch.cat(passed.slots), torch.cat(passed.gates), torch.cat(added),
            torch.cat(norms) / math.sqrt(factor), passed.lengths, scale, *router,
        )  # fmt: skip
    return UnitResult(NoFacts(), transient=(shard_given.write(job.part_dir, of.layer, args.shard),))


def _scale(student: Student, of: LayerArgs, hidden_BTD: Tensor, passed: Passed) -> float:
    """The factor with which the layer adds what its experts give, seen on the first micro-batch."""
    assert passed.first_x is not None

    def layer(output_TD: Tensor) -> Tensor:
        return student.run(hidden_BTD, lambda *_routed: output_TD).flatten(0, 1)

    return output_scale(layer, passed.bare[0].flatten(0, 1), passed.first_x, f"layer {of.layer}")
