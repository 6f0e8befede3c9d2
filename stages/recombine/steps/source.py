"""The step source: the source's stream of a token shard through a layer."""

import torch

from stages.contracts.paths import hidden_file
from stages.contracts.units import HeldJob, NoFacts, UnitResult
from stages.model.stream import write_hidden
from stages.recombine.calls import SourceArgs
from stages.recombine.steps.held import HeldLayer
from stages.recombine.steps.passing import entering, ids_of


def source_unit(job: HeldJob[SourceArgs, HeldLayer]) -> UnitResult[NoFacts]:
    """Send the source's stream of a token shard through the layer as it is. All that it writes is transient."""
    args, shard = job.args, job.held
    with torch.inference_mode():
        entered = entering(job.part_dir, shard, args.layer, args.shard, ids_of(job, args), is_source=True)
        left = [shard.run_layer(args.layer, hidden_BTD) for hidden_BTD in entered]
    return UnitResult(NoFacts(), transient=(write_hidden(hidden_file(job.part_dir, args.layer + 1, args.shard), left),))
