"""The step advance: a token shard goes on to the next layer."""

import torch

from stages.contracts.paths import hidden_file, student_file, tokens_file
from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.model.stream import read_token_ids, write_hidden
from stages.recombine.calls import AdvanceArgs
from stages.recombine.steps.held import HeldLayer
from stages.recombine.steps.passing import streams


def advance_unit(job: HeldJob[AdvanceArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """Send a token shard through a layer: the student's stream as the layer is solved; through a layer without experts every
    stream as it is. All that it writes is transient."""
    args, shard = job.args, job.held
    ids = list(read_token_ids(job.run_dir / args.tokens_dir / tokens_file(args.shard)).split(args.micro_batch))
    source, ours = streams(job.part_dir, shard, args.layer, args.shard, ids, args.is_one_shot, has_source=not args.has_plan)
    source_path = hidden_file(job.part_dir, args.layer + 1, args.shard)
    student_path = student_file(job.part_dir, args.layer + 1, args.shard)
    if args.has_plan:
        with torch.inference_mode():
            student = shard.solved(job.part_dir)
            return UnitResult(
                NoFacts(), transient=(write_hidden(student_path, [student.run(hidden, student.outputs) for hidden in ours]),)
            )
    written = [write_hidden(source_path, [shard.run_layer(args.layer, hidden) for hidden in source])]
    if not args.is_one_shot:
        written.append(write_hidden(student_path, [shard.run_layer(args.layer, hidden) for hidden in ours]))
    return UnitResult(NoFacts(), transient=tuple(written))
