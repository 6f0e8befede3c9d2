"""The step advance: the student's stream of a token shard goes on to the next layer."""

import torch

from stages.contracts.paths import student_file
from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.model.stream import write_hidden
from stages.recombine.calls import AdvanceArgs
from stages.recombine.steps.held import HeldLayer
from stages.recombine.steps.passing import entering, ids_of


def advance_unit(job: HeldJob[AdvanceArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """Send the student's stream of a token shard through a layer: as it is solved, or, where it has no experts, as it is. All
    that it writes is transient."""
    args, shard = job.args, job.held
    with torch.inference_mode():
        entered = entering(job.part_dir, shard, args.layer, args.shard, ids_of(job, args), is_source=False)
        if args.has_plan:
            student = shard.solved(job.part_dir)
            left = [student.run(hidden_BTD, student.outputs) for hidden_BTD in entered]
        else:
            left = [shard.run_layer(args.layer, hidden_BTD) for hidden_BTD in entered]
    return UnitResult(NoFacts(), transient=(write_hidden(student_file(job.part_dir, args.layer + 1, args.shard), left),))
