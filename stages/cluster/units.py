"""Units of cluster: the dendrogram of one layer; protected experts, budget and plans of a target."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from stages.checkpoint.folder import Checkpoint
from stages.cluster.allocation import allocate
from stages.cluster.budgets.registry import budgets
from stages.cluster.certainty import relative_standard_errors, stability
from stages.cluster.domains import read_mixed
from stages.cluster.neurons import with_neurons
from stages.cluster.protection import least_slots, planned, super_experts
from stages.cluster.registry import method_at
from stages.cluster.spec import (
    BudgetArgs,
    CostArgs,
    DendrogramArgs,
    DendrogramFacts,
    PlanArgs,
    PlanFacts,
    Planning,
    ProtectArgs,
)
from stages.contracts.budget import BudgetFacts, LayerCosts, Planner, read_budget, read_costs, write_budget, write_costs
from stages.contracts.certainty import write_errors, write_stability
from stages.contracts.dendrogram import all_cuts, write_dendrogram, write_labels
from stages.contracts.layer_plan import write_plan
from stages.contracts.method import Method, PlanSettings
from stages.contracts.paths import (
    TENSORS_FILE,
    budget_file,
    costs_file,
    dendrogram_file,
    errors_file,
    labels_file,
    plan_file,
    protected_file,
    stability_file,
)
from stages.contracts.protection import LARGEST, ProtectFacts, read_protected, write_protected
from stages.contracts.settings import Merging
from stages.contracts.units import Job, NoFacts, UnitResult
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
    args = job.args
    planner = _planner(job, args.planning, args.layer, num_slots=args.num_slots)
    num_slots = args.num_slots if args.num_slots is not None else read_budget(budget_file(job.part_dir))[args.layer]
    plan = planner.plan(num_slots)
    if len(plan.slots) != num_slots:
        raise ValueError(
            f"layer {args.layer}: method {planner.method.name} planned {len(plan.slots)} slots instead of {num_slots}; mend "
            f"the method that made the plan"
        )
    merging = _merging(args.planning, planner.method)
    if merging.align == "weight":
        from stages.checkpoint.neuron_weights import NeuronWeights  # reads by torch, which no other unit here needs

        tensors = job.run_dir / args.planning.survey_dir / TENSORS_FILE
        with NeuronWeights(args.planning.model, tensors, args.layer) as weights:
            plan = with_neurons(plan, planner.evidence, merging, weights.between, args.planning.max_bytes)
    else:
        plan = with_neurons(plan, planner.evidence, merging, None, args.planning.max_bytes)
    files = [write_plan(plan_file(job.part_dir, args.layer), plan)]
    for name in planner.method.alternatives_in("tied" if args.planning.router is None else "stock"):
        other = replace(planner.method, plan=planner.method.alternatives[name].plan)
        found = planned(other, planner.evidence, num_slots, planner.settings)
        files.append(write_plan(plan_file(job.part_dir / name, args.layer), found))
    return UnitResult(PlanFacts(args.layer, plan.unweighted_slots), files)


def _merging(planning: Planning, method: Method[Any]) -> Merging:
    """How neurons are brought together; the default, which leaves them, where the method merges nothing."""
    return planning.merging if method.reads_merging else Merging()


def _planner(
    job: Job[Any], planning: Planning, layer: int, columns: Iterable[str] = (), num_slots: int | None = None
) -> Planner:
    """A layer with its evidence, protected experts and method. columns: further ones that are read. num_slots: None where a
    budget decides it, which must see the same evidence as the plan does then."""
    method = method_at(planning.method)
    clustering = method.settings.model_validate(planning.clustering)
    protected = read_protected(protected_file(job.part_dir)).get(layer, ()) if clustering.protect != "none" else ()
    is_grouped = method.reads_groups and planning.router is not None
    groups = groups_in(Checkpoint(planning.model).config, planning.model) if is_grouped else None
    num_groups = 1 if groups is None else groups.num_groups
    settings = PlanSettings(clustering, planning.merging, planning.router, num_groups, protected)
    num_kept = None if method.linkage else num_slots  # a dendrogram serves all targets
    required = {*method.requires(clustering), *_merging(planning, method).requires, *columns}
    evidence = read_mixed(job.run_dir / planning.calibrate_dir, layer, required, planning.mix, num_kept)
    return Planner(evidence, method, settings, lambda num_slots: planned(method, evidence, num_slots, settings))


def protect_unit(job: Job[ProtectArgs]) -> UnitResult[ProtectFacts]:
    """Find the super experts of all layers."""
    args = job.args
    folder = job.run_dir / args.calibrate_dir
    largest_LE = np.stack([read_mixed(folder, layer, [LARGEST], args.mix, None)[LARGEST] for layer in args.layers])
    is_super_LE = super_experts(largest_LE)
    experts = {layer: tuple(np.flatnonzero(row).tolist()) for layer, row in zip(args.layers, is_super_LE, strict=True)}
    facts = ProtectFacts(tuple((layer, expert) for layer, found in experts.items() for expert in found))
    return UnitResult(facts, [write_protected(protected_file(job.part_dir), experts)])


def cost_unit(job: Job[CostArgs]) -> UnitResult[NoFacts]:
    """Write what each number of experts that a layer may keep costs it."""
    args, kind = job.args, budgets()[job.args.kind]
    assert kind.costs is not None, kind.name
    planner = _planner(job, args.planning, args.layer, kind.requires)
    num_experts = planner.evidence.num_experts
    fewest = least_slots(planner.method, num_experts, len(planner.settings.protected))
    counts = args.bounds.choices(num_experts, fewest)
    costs = LayerCosts(tuple(counts), kind.costs(planner, counts))
    return UnitResult(NoFacts(), [write_costs(costs_file(job.part_dir, args.layer), costs)])


def budget_unit(job: Job[BudgetArgs]) -> UnitResult[BudgetFacts]:
    """Decide how many experts each layer keeps."""
    args = job.args
    costs = [read_costs(costs_file(job.part_dir, layer)) for layer in args.layers]
    facts = BudgetFacts(args.layers, tuple(allocate(costs, args.total, args.place)))
    return UnitResult(facts, [write_budget(budget_file(job.part_dir), facts)])
