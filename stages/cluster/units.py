"""Units of cluster: the dendrogram of one layer, and the plan of one layer of a target."""

import numpy as np

from stages.checkpoint.folder import Checkpoint
from stages.cluster.certainty import relative_standard_errors, stability
from stages.cluster.domains import read_mixed
from stages.cluster.linkage import all_cuts
from stages.cluster.neurons import with_neurons
from stages.cluster.registry import method_at
from stages.cluster.spec import DendrogramArgs, DendrogramFacts, PlanArgs, PlanFacts
from stages.contracts.certainty import write_errors, write_stability
from stages.contracts.dendrogram import write_dendrogram, write_labels
from stages.contracts.layer_plan import write_plan
from stages.contracts.method import PlanSettings
from stages.contracts.paths import TENSORS_FILE, dendrogram_file, errors_file, labels_file, plan_file, stability_file
from stages.contracts.settings import Merging
from stages.contracts.units import Job, UnitResult
from stages.model.families import groups_in


def dendrogram_unit(job: Job[DendrogramArgs]) -> UnitResult[DendrogramFacts]:
    """Write the dendrogram and all its cuts of one layer; under sampling also how certain they are."""
    args, layer, method = job.args, job.args.layer, method_at(job.args.method)
    settings, linkage = method.settings.model_validate(args.clustering), method.linkage
    assert linkage is not None, method.name
    calibrate_dir, required = job.run_dir / args.calibrate_dir, method.requires(settings)
    evidence = read_mixed(calibrate_dir, layer, required, args.mix, None)
    linkage_Z = linkage(evidence, settings)
    files = [
        write_dendrogram(dendrogram_file(job.part_dir, layer), linkage_Z),
        write_labels(labels_file(job.part_dir, layer), all_cuts(linkage_Z)),
    ]
    if evidence.groups is not None:
        files.append(write_errors(errors_file(job.part_dir, layer), relative_standard_errors(evidence.groups)))
        equal_share_K, index_K = stability(evidence, linkage_Z, lambda half: linkage(half, settings), args.seed)
        files.append(write_stability(stability_file(job.part_dir, layer), equal_share_K, index_K))
    return UnitResult(DendrogramFacts(float(np.max(linkage_Z[-1:, 2], initial=0.0))), files)


def plan_unit(job: Job[PlanArgs]) -> UnitResult[PlanFacts]:
    """Write the plan of one layer of a target."""
    args, method = job.args, method_at(job.args.method)
    clustering = method.settings.model_validate(args.clustering)
    merging = args.merging if method.reads_merging else Merging()
    calibrate_dir, required = job.run_dir / args.calibrate_dir, method.requires(clustering) | merging.requires
    num_kept = None if method.linkage else args.num_slots  # a dendrogram serves all targets
    evidence = read_mixed(calibrate_dir, args.layer, required, args.mix, num_kept)
    groups = groups_in(Checkpoint(args.model).config, args.model) if method.reads_groups and args.router is not None else None
    settings = PlanSettings(clustering, args.merging, args.router, 1 if groups is None else groups.num_groups)
    plan = method.plan(evidence, args.num_slots, settings)
    if len(plan.slots) != args.num_slots:
        raise ValueError(
            f"layer {args.layer}: method {method.name} planned {len(plan.slots)} slots instead of {args.num_slots}"
        )
    if merging.align == "weight":
        from stages.checkpoint.neuron_weights import NeuronWeights  # reads by torch, which no other unit here needs

        with NeuronWeights(args.model, job.run_dir / args.survey_dir / TENSORS_FILE, args.layer) as weights:
            plan = with_neurons(plan, evidence, merging, weights.between, args.max_bytes)
    else:
        plan = with_neurons(plan, evidence, merging, None, args.max_bytes)
    return UnitResult(PlanFacts(args.layer, plan.unweighted_slots), [write_plan(plan_file(job.part_dir, args.layer), plan)])
