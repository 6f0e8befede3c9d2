"""How pairs of a target are chosen, whether its router is fitted, and how much its token shards count. No torch."""

from stages.checkpoint.folder import Checkpoint
from stages.contracts.method import PairCost
from stages.contracts.spec import Run, text_facts
from stages.contracts.targets import Target, Variant
from stages.contracts.tensors import num_neurons
from stages.model.families import groups_in
from stages.recombine.calls import SAMPLED, PairArgs

MOST_OPERATIONS = 1e15
"""Of a layer, up to which `pair_cost: auto` compares pairs by elimination."""


def pair_cost(variant: Variant) -> PairCost:
    """By what pairs of a variant are compared."""
    cost: PairCost = variant.method.pair_cost(variant.clustering)
    return cost


def no_elimination(variant: Variant) -> str:
    """Why pairs of a variant cannot be chosen by elimination; empty if they can."""
    if variant.refit.neurons != "choose":
        return "refit.neurons is not choose, so no neurons are eliminated"
    if variant.merging.method != "frequency":
        return f"merging.method is {variant.merging.method}, and pairs are weighed by use"
    if variant.export.planned_router != "frequency":
        return f"export.router is {variant.export.router}, and rows of pairs are weighed by use, or fitted"
    if variant.clustering.protect != "none":
        return f"clustering.protect is {variant.clustering.protect}, and pairs are made of all experts"
    return ""


def is_fitted(target: Target) -> bool:
    """Whether a target's router rows are fitted."""
    return target.format == "stock" and target.variant.export.router == "fitted"


def pairs_of(run: Run, target: Target) -> PairArgs | None:
    """How the pairs of a target are chosen anew; None where they stay as planned."""
    variant = target.variant
    cost = pair_cost(variant)
    if cost == "importance" or no_elimination(variant):
        return None
    if cost == "auto" and pair_operations(run.survey.num_experts, num_neurons(run.tensors)) > MOST_OPERATIONS:
        return None
    is_grouped = variant.method.reads_groups and target.format == "stock"
    groups = groups_in(Checkpoint(run.model).config, str(run.model)) if is_grouped else None
    return PairArgs(1 if groups is None else groups.num_groups)


def pair_operations(num_experts: int, num_neurons: int) -> float:
    """Floating-point operations of the losses of all pairs of a layer, about, if they were compared by all neurons: products of
    the columns of both experts on the sampled tokens, and two factors with their inverses."""
    columns = 2 * num_neurons
    return num_experts * (num_experts - 1) / 2 * columns**2 * (2.0 * SAMPLED + 4.0 * columns)


def shard_weights(run: Run, target: Target) -> tuple[float, ...]:
    """How much each token shard counts, so that domains count as their `weight` says; empty where they count as drawn."""
    data = run.config.calibration
    if not isinstance(data.data, dict) or target.variant.clustering.domain_weights != "given":
        return ()
    total = sum(domain.weight for domain in data.data.values())
    weights, num_tokens = [1.0] * data.num_shards, text_facts(run, "calibration", "num_tokens")  # of padded ones not the same
    for name, shards in data.shards_by_domain.items():
        share = num_tokens[name] / sum(num_tokens.values())
        for shard in shards:
            weights[shard] = data.data[name].weight / total / share
    return tuple(weights)
