"""The stage recombine: W_down of the experts that a layer plan leaves, solved anew, layer after layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue
from rich import filesize

from stages.checkpoint.folder import Checkpoint
from stages.contracts import paths
from stages.contracts.errors import InputError
from stages.contracts.keys import Part
from stages.contracts.partition import held_bytes
from stages.contracts.settings import RunConfig
from stages.contracts.spec import Run, StagePlan, StageSpec, narrowed_to
from stages.contracts.stream_units import LayerShardArgs
from stages.contracts.targets import Target
from stages.contracts.tensors import num_neurons
from stages.contracts.units import Hold, HoldCall, NoFacts, Unit, UnitCall
from stages.contracts.widths import kept_neurons
from stages.model.families import SUPPORTED, family_of, num_experts_in
from stages.model.widths import narrowed, num_neurons_in

JOINT_COLUMNS = 4096
"""Up to so many columns (experts times neurons) all slots are solved together; else one after another (Gauss-Seidel), each on
what the others leave. A fixed number, because results depend on it."""
_POOR, _GOOD = 5, 20
"""Tokens for each neuron that is chosen from: fewer than the first make a poor choice, the second is the aim."""


@dataclass(frozen=True)
class SolveArgs:
    """A MoE layer of a target.

    tokens_dir, plan_dir: of the calibration set and of the method's plans, relative to the run directory. micro_batch:
    sequences that run at once. ridge: None to be chosen. num_neurons: whole neurons that each slot keeps of its members'; None
    if they are not chosen. score: of the family's router, whose rows are fitted; None if they are not. is_one_shot: whether the
    layer gets what the source's earlier layers give, instead of what is left of them.
    """

    tokens_dir: str
    plan_dir: str
    layer: int
    num_shards: int
    micro_batch: int
    ridge: float | None
    num_neurons: int | None
    score: str | None
    is_one_shot: bool


@dataclass(frozen=True)
class SolveFacts:
    """ridge: that was used. error_before, error_after: of the layer's output, squared, over that of giving nothing.
    is_router_fitted: whether router rows were fitted, and gave a lesser error on held-out tokens than those of the
    planned rule."""

    layer: int
    ridge: float
    error_before: float
    error_after: float
    is_router_fitted: bool


@dataclass(frozen=True)
class AdvanceArgs:
    """A token shard through a layer, as the source has it and as it is refitted. has_plan: whether the layer has experts.
    is_one_shot: only as the source has it."""

    tokens_dir: str
    layer: int
    shard: int
    micro_batch: int
    has_plan: bool
    is_one_shot: bool


@dataclass(frozen=True)
class KeepArgs:
    """A MoE layer of a target that loses nothing. plan_dir: of the method's plans, relative to the run directory."""

    plan_dir: str
    layer: int


OPEN = HoldCall("stages.recombine.units:open_layer", LayerShardArgs)
SOLVE = UnitCall("stages.recombine.units:solve_unit", SolveArgs, SolveFacts)
ADVANCE = UnitCall("stages.recombine.units:advance_unit", AdvanceArgs, NoFacts)
KEEP = UnitCall("stages.recombine.units:keep_unit", KeepArgs, NoFacts)


def _refitted(run: Run) -> list[Target]:
    return [target for target in run.targets if target.variant.refit.mode != "none"]


def _is_fitted(target: Target) -> bool:
    return target.format == "stock" and target.variant.export.router == "fitted"


class Recombine(StageSpec):
    """Solved W_down of every target whose variant is refitted."""

    name = "recombine"
    version = 2
    libraries = ("torch", "transformers")
    after = ("prepare", "cluster")

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Raise InputError for a family whose layers do more with the outputs of experts than to add them up with gates, and
        for a width that its config cannot express."""
        place = str(checkpoint.folder)
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
        layer = max(held_bytes(survey, (one, one + 1), data) for one in survey.moe_layers)
        target = max(targets, key=lambda one: _solve_bytes(run, one))
        needed = layer + _solve_bytes(run, target)
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
            settings |= {"width": target.width, "is_router_fitted": _is_fitted(target)}
            yield run.new_part(self, target.part, settings, upstream)

    def units(self, run: Run) -> Iterator[Unit]:
        """For each layer up to the last with experts: its solution, and the token shards' way to the next layer. A target that
        keeps all experts whole keeps its plans."""
        for target in _refitted(run):
            part = run.part(self.name, target.part)
            yield from (_kept_units if _is_whole(run, target) else _target_units)(run, target, part)

    def plan(self, run: Run) -> StagePlan:
        """A unit for each MoE layer, and one for each token shard and layer."""
        targets = [target for target in _refitted(run) if not _is_whole(run, target)]
        shards = run.config.calibration.num_shards
        if not targets:
            return StagePlan("", "workers")
        last = run.survey.moe_layers[-1]
        memory = filesize.decimal(max(_solve_bytes(run, target) for target in targets))
        lines = [
            "sequential: one worker solves a layer, then all pass token shards through it; one_shot: all layers at once",
            f"memory of the worker that solves: about {memory} and the layer; "
            f"{_tokens_per_neuron(run):.1f} calibration tokens for each neuron that is chosen from (aim: {_GOOD})",
        ]
        return StagePlan(
            f"{len(targets)} targets x ({len(run.survey.moe_layers)} layers + {last} x {shards} token shards)", "workers", lines
        )


def _solve_bytes(run: Run, target: Target) -> int:
    """Memory in bytes of a solution, without the layer: of every calibration token the experts' input and the target, each in
    pieces and in one, and what is left of the target in float64, twice where a fitted router is compared; and moments of the
    columns that are solved for together, or of the neurons that a slot of average size chooses from: themselves, those of what
    is left, their factor and its inverse."""
    data, survey, width = run.config.calibration, run.survey, num_neurons(run.tensors)
    itemsize = {"float32": 4, "float64": 8}.get(survey.dtype, 2)
    num_values = data.num_sequences * data.sequence_length * survey.hidden_size
    fewest = min(target.counts(survey).values())
    columns = fewest * width if fewest * width <= JOINT_COLUMNS else width
    candidates = -(-survey.num_experts // fewest) * width if target.variant.refit.neurons == "choose" else 0
    tokens = num_values * (2 * itemsize + 2 * 4 + 8) * (2 if _is_fitted(target) else 1)
    return tokens + 4 * 8 * max(columns, candidates) ** 2


def _tokens_per_neuron(run: Run) -> float:
    """Calibration tokens that the average expert gets, over its neurons: the same share for a slot and all its members."""
    data, survey = run.config.calibration, run.survey
    tokens = data.num_sequences * data.sequence_length * survey.top_k / survey.num_experts
    return tokens / num_neurons(run.tensors)


def _is_whole(run: Run, target: Target) -> bool:
    """Whether a target keeps all experts with all neurons, so that there is nothing to mend."""
    survey = run.survey
    return target.share(survey.num_experts) == 1 and set(target.counts(survey).values()) == {survey.num_experts}


def _kept_units(run: Run, target: Target, part: Part) -> Iterator[Unit]:
    for layer in run.survey.moe_layers:
        args = KeepArgs(run.part("cluster", target.part).dir, layer)
        yield run.unit(part, f"layer-{layer:04d}", KEEP.on(args), f"{target.part}, layer {layer}")


def _target_units(run: Run, target: Target, part: Part) -> Iterator[Unit]:
    data, survey, folder = run.config.calibration, run.survey, Path(part.dir)
    tokens, refit = run.part("prepare", "calibration").dir, target.variant.refit
    width, is_one_shot = narrowed_to(run, target) or num_neurons(run.tensors), refit.mode == "one_shot"
    for layer in range(survey.moe_layers[-1] + 1):
        call = OPEN.on(LayerShardArgs(str(run.model), layer, layer + 1, run.config.resources.num_cpus))
        hold = Hold(f"{run.run_dir}/{part.dir}:{layer}", call, str(run.run_dir), f"{part.stage} {target.part}, layer {layer}")
        before: list[Unit] = []
        memory = held_bytes(survey, (layer, layer + 1), data)
        if layer in survey.moe_layers:
            args = SolveArgs(
                tokens, run.part("cluster", target.part).dir, layer, data.num_shards, data.micro_batch,
                None if refit.ridge == "auto" else refit.ridge, width if refit.neurons == "choose" else None,
                SUPPORTED[survey.family].score if _is_fitted(target) else None, is_one_shot,
            )  # fmt: skip
            solved = run.unit(
                part, f"layer-{layer:04d}", SOLVE.on(args), f"{target.part}, layer {layer}",
                reads=[path for shard in range(data.num_shards) for path in _hidden(folder, layer, shard, is_one_shot)],
                hold=hold, on_worker=True, memory_bytes=memory + _solve_bytes(run, target),
            )  # fmt: skip
            yield solved
            before = [] if is_one_shot else [solved]
        if layer == survey.moe_layers[-1]:
            return
        for shard in range(data.num_shards):
            advanced = AdvanceArgs(tokens, layer, shard, data.micro_batch, layer in survey.moe_layers, is_one_shot)
            yield run.unit(
                part, f"layer-{layer:04d}/tokens-{shard:04d}", ADVANCE.on(advanced),
                f"{target.part}, layer {layer}, tokens {shard + 1}/{data.num_shards}",
                reads=_hidden(folder, layer, shard, is_one_shot), writes=_hidden(folder, layer + 1, shard, is_one_shot),
                after=before, hold=hold, on_worker=True, memory_bytes=memory,
            )  # fmt: skip


def _hidden(folder: Path, layer: int, shard: int, is_one_shot: bool) -> list[Path]:
    """Hidden states as they enter a layer, of both streams or of the source's alone; none at the first, which embeds the
    tokens."""
    files = [paths.hidden_file(folder, layer, shard), paths.student_file(folder, layer, shard)]
    return files[: 1 if is_one_shot else 2] if layer else []


SPEC = Recombine()
