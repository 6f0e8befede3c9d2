"""The stage recombine: W_down of the experts that a layer plan leaves, solved anew, layer after layer."""

from collections.abc import Iterator, Sequence

from pydantic import JsonValue
from rich import filesize

from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.settings import RunConfig
from stages.contracts.spec import Run, StagePlan, StageSpec
from stages.contracts.targets import Target
from stages.contracts.tensors import num_neurons
from stages.contracts.units import Unit
from stages.contracts.widths import kept_neurons
from stages.contracts.work import work_text
from stages.model.families import family_of, num_experts_in
from stages.model.widths import narrowed, num_neurons_in
from stages.recombine.calls import Bounds, num_candidates
from stages.recombine.listing import kept_units, target_units
from stages.recombine.needs import LayerNeeds, alone_flops, disk_bytes, layer_needs, target_flops, worker_bytes
from stages.recombine.pairing import is_fitted, no_elimination, pair_cost

_POOR, _GOOD = 5, 20
"""Tokens for each neuron that is chosen from: fewer than the first make a poor choice, the second is the aim."""


def _refitted(run: Run) -> list[Target]:
    return [target for target in run.targets if target.variant.refit.mode != "none"]


class Recombine(StageSpec):
    """Solved W_down of every target whose variant is refitted."""

    name = "recombine"
    version = 10
    libraries = ("torch", "transformers")
    after = ("prepare", "cluster")

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Raise InputError for a family whose layers do more with the outputs of experts than to add them up with gates, for
        a width that its config cannot express, and for pairs by elimination where slots are more than chosen neurons."""
        place = str(checkpoint.folder)
        for target in targets:
            reason = no_elimination(target.variant)
            if reason and pair_cost(target.variant) == "elimination":
                raise InputError(f"clustering.pair_cost is elimination, but {reason}; set pair_cost to auto or importance")
        if refitted := [target for target in targets if target.variant.refit.mode != "none"]:
            family = family_of(checkpoint.config, place)
            reason = "gates multiply its experts' inputs" if family.gates_input else ""
            reason = reason or ("layers normalise what their experts give" if family.normalises_outputs else "")
            if reason:
                mode = refitted[0].variant.refit.mode
                raise InputError(f"{place}: refit.mode is {mode}, but this family's {reason}; set it to none")
        for target in targets:
            share = target.share(num_experts_in(checkpoint.config, place))
            if share != 1:
                multiple = target.variant.refit.width_multiple
                narrowed(checkpoint.config, kept_neurons(num_neurons_in(checkpoint.config, place), share, multiple), place)

    def remarks(self, run: Run) -> Iterator[str]:
        """Lines about a solution that takes more memory than a worker has, and about too little calibration text."""
        targets = [target for target in _refitted(run) if not _is_whole(run, target)]
        if not targets:
            return
        survey, data, resources = run.survey, run.config.calibration, run.config.resources
        target = max(targets, key=lambda one: worker_bytes(run, one))
        needed = worker_bytes(run, target)
        if needed > resources.worker_memory:
            yield (
                f"memory       {target.part}: solving a layer takes about {filesize.decimal(needed)}, more than "
                f"resources.worker_memory, {filesize.decimal(resources.worker_memory)}; calibrate with fewer tokens, or use "
                "workers with more memory"
            )
        per_neuron = _tokens_per_neuron(run)
        if per_neuron < _POOR and any(target.variant.refit.neurons == "choose" for target in targets):
            aim = -(-_GOOD * num_neurons(run.tensors) * survey.num_experts // (data.sequence_length * survey.top_k))
            yield (
                f"few tokens   {per_neuron:.1f} calibration tokens for each neuron that refit.neurons chooses from; fewer than "
                f"{_POOR} choose poorly: set calibration.num_sequences to {aim:,} for {_GOOD}"
            )

    def parts(self, run: Run) -> Iterator[Part]:
        """One for each target that is refitted."""
        for target in _refitted(run):
            upstream = {
                "model": run.part("prepare", "model"),
                "tokens": run.part("prepare", "calibration"),
                "plans": run.part("cluster", target.part),
            }
            settings: dict[str, JsonValue] = target.variant.refit.model_dump(mode="json")
            settings |= {"width": target.width, "is_router_fitted": is_fitted(target)}
            if alternatives := target.variant.method.alternatives_in(target.format):
                settings["alternatives"] = list(alternatives)
            bounds = Bounds.of(run.config.resources.worker_memory)
            settings["joint_columns"] = bounds.joint_columns
            if target.variant.refit.neurons == "choose":
                settings["choice_columns"] = _choice_columns(run, target, bounds)
            yield run.new_part(self, target.part, settings, upstream)

    def units(self, run: Run) -> Iterator[Unit]:
        """For each layer up to the last with experts: its solution, and the token shards' way to the next layer. A target that
        keeps all experts whole keeps its plans."""
        for target in _refitted(run):
            part = run.part(self.name, target.part)
            if _is_whole(run, target):
                yield from kept_units(run, target, part)
            else:
                yield from target_units(run, target, part)

    def plan(self, run: Run) -> StagePlan:
        """A unit for each MoE layer, and one for each token shard and layer."""
        targets = [target for target in _refitted(run) if not _is_whole(run, target)]
        shards = run.config.calibration.num_shards
        if not targets:
            return StagePlan("", "workers")
        lines = [
            "sequential: all workers pass token shards through a layer and choose its slots' neurons, one solves; "
            "one_shot: all layers at once",
            *(_target_line(run, target) for target in targets),
            f"{_tokens_per_neuron(run):.1f} calibration tokens for each neuron that is chosen from (aim: {_GOOD})",
        ]
        passes = 2 if all(target.variant.refit.mode == "one_shot" for target in targets) else 3
        return StagePlan(
            f"{len(targets)} targets x {len(run.survey.moe_layers)} layers x ({passes} x {shards} token shards + slots + 2)",
            "workers",
            lines,
            disk_bytes=max(disk_bytes(run, target) for target in targets),
        )


def _choice_columns(run: Run, target: Target, bounds: Bounds) -> int:
    """Neurons at most that a slot chooses from, as far as a slot could have them: memory that no slot needs changes no key."""
    if run.expert_sizes is None:
        return bounds.choice_columns
    num_experts, num_neurons = run.expert_sizes
    kept = kept_neurons(num_neurons, target.share(num_experts), target.variant.refit.width_multiple)
    return num_candidates(num_experts * num_neurons, kept, bounds.choice_columns)


def _target_line(run: Run, target: Target) -> str:
    """What a target computes, how long that takes at stated rates, how it is solved, and the memory of a worker."""
    needs, resources = layer_needs(run, target), run.config.resources
    flops = target_flops(run, target)
    work = work_text(flops, alone_flops(run, target))
    how = "all slots together" if needs.is_joint else f"slot after slot (more than {needs.bounds.joint_columns:,} columns)"
    shared = f" and a shared expert of {needs.shared:,} neurons" if needs.shared else ""
    chosen = ""
    if needs.candidates:
        fewer = f" (of {needs.wanted:,} with more worker_memory)" if needs.candidates < needs.wanted else ""
        chosen = f"a slot chooses {needs.kept:,} of {needs.candidates:,} neurons{fewer}; "
    plans = ""
    if needs.num_plans > 1:
        one = target_flops(run, target, num_plans=1)
        plans = (
            f", as {needs.num_plans} plans of each layer are solved and the best is taken ({flops / one:.1f} times one plan's)"
        )
    return (
        f"{target.part}: about {work}{plans}; {chosen}W_down is solved for {how}, {needs.columns:,} columns of "
        f"{needs.num_slots} slots{shared}, {_tokens_per_column(needs):.1f} tokens each; memory of a "
        f"worker: about {filesize.decimal(worker_bytes(run, target))} of resources.worker_memory "
        f"{filesize.decimal(resources.worker_memory)}, moments {filesize.decimal(needs.moment_bytes)} of it"
    )


def _tokens_per_column(needs: LayerNeeds) -> float:
    """Tokens over columns of a slot, or of the shared expert where it has fewer."""
    least = needs.tokens / needs.kept
    return min(least, needs.all_tokens / needs.shared) if needs.shared else least


def _tokens_per_neuron(run: Run) -> float:
    """Calibration tokens that the average expert gets, over its neurons: the same share for a slot and all its members."""
    data, survey = run.config.calibration, run.survey
    tokens = data.num_sequences * data.sequence_length * survey.top_k / survey.num_experts
    return tokens / num_neurons(run.tensors)


def _is_whole(run: Run, target: Target) -> bool:
    """Whether a target keeps all experts with all neurons, so that there is nothing to mend."""
    survey = run.survey
    return target.share(survey.num_experts) == 1 and set(target.counts(survey).values()) == {survey.num_experts}


SPEC = Recombine()
