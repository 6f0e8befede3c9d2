"""Units of mtp: the distances of a layer's experts, and the layer's plan for a target."""

import torch

from stages.checkpoint.folder import Checkpoint
from stages.checkpoint.row_blocks import weight_gram
from stages.checkpoint.schemes import WEIGHT
from stages.contracts.expert_distances import read_distances, write_distances
from stages.contracts.layer_plan import read_plan, write_plan
from stages.contracts.paths import TENSORS_FILE, distances_file, plan_file
from stages.contracts.tensors import read_tensors
from stages.contracts.units import Job, NoFacts, UnitResult
from stages.model.families import groups_in
from stages.mtp.follow import distances, follow
from stages.mtp.spec import DistancesArgs, FollowArgs


def distances_unit(job: Job[DistancesArgs]) -> UnitResult[NoFacts]:
    """Write the distances of a layer's experts."""
    args = job.args
    torch.set_num_threads(args.num_threads)
    rows = [row for row in read_tensors(job.run_dir / args.survey_dir / TENSORS_FILE) if row.layer == args.layer]
    of_experts = [row for row in rows if row.like in ("expert", "fused_expert") and row.part in ("", WEIGHT)]
    checkpoint = Checkpoint(args.model)
    gram_EE = weight_gram(checkpoint, [row for row in of_experts if row.expert in (None, 0)], args.num_experts)
    written = write_distances(distances_file(job.part_dir, args.layer), distances(gram_EE))
    return UnitResult(NoFacts(), [written], bytes_read=sum(checkpoint.tensors[row.values].stored_bytes for row in of_experts))


def follow_unit(job: Job[FollowArgs]) -> UnitResult[NoFacts]:
    """Write the plan of a layer."""
    args = job.args
    plan = read_plan(plan_file(job.run_dir / args.plan_dir, args.last))
    distance_EE = read_distances(distances_file(job.run_dir / args.distances_dir, args.layer))
    groups = groups_in(Checkpoint(args.model).config, args.model)
    made = follow(plan, args.layer, distance_EE, 1 if groups is None else groups.num_groups)
    return UnitResult(NoFacts(), [write_plan(plan_file(job.part_dir, args.layer), made)])
