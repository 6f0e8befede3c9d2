"""The units of a refitted target: what each step of a layer reads, writes and waits for, and which workers it may run on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.contracts import paths
from stages.contracts.keys import Part
from stages.contracts.spec import Run, counts_of, narrowed_to
from stages.contracts.stream_units import LayerShardArgs
from stages.contracts.targets import Target
from stages.contracts.tensors import num_neurons
from stages.contracts.units import Call, Hold, Unit
from stages.model.families import SUPPORTED
from stages.recombine.calls import (
    ADVANCE,
    CHOOSE,
    COMPARE,
    GATHER,
    KEEP,
    OPEN,
    OWN,
    SOLVE,
    SOURCE,
    START,
    AdvanceArgs,
    Bounds,
    ChooseArgs,
    CompareArgs,
    GatherArgs,
    KeepArgs,
    LayerArgs,
    SolveArgs,
    SourceArgs,
    StartArgs,
)  # fmt: skip
from stages.recombine.needs import LayerNeeds, layer_bytes, layer_needs
from stages.recombine.pairing import is_fitted, pairs_of, shard_weights

_LANES_PER_WORKER = 2
"""Units of a step are dealt to so many holds for each worker, so that a worker that is done early finds more."""
_AHEAD = 4
"""While a layer is solved, one worker of so many sends the source's stream through the next. The others keep the solved layer
open, which they need next."""


def kept_units(run: Run, target: Target, part: Part) -> Iterator[Unit]:
    """Of a target that keeps all experts whole: its plans stay as they are."""
    for layer in run.survey.moe_layers:
        args = KeepArgs(run.part("cluster", target.part).dir, layer)
        yield run.unit(part, f"layer-{layer:04d}", KEEP.on(args), f"{target.part}, layer {layer}")


def target_units(run: Run, target: Target, part: Part) -> Iterator[Unit]:
    """Layer after layer, up to the last with experts."""
    steps = _Steps(run, target, part, layer_needs(run, target))
    counts = counts_of(run, target)
    yield from steps.source(0)
    for layer in range(run.survey.moe_layers[-1] + 1):
        yield from steps.of_experts(layer, counts[layer]) if layer in counts else steps.of_dense(layer)


def num_lanes(num_workers: int, num_layers: int, is_one_shot: bool) -> int:
    """Holds that the units of one step of a layer are dealt to. One worker needs one; where layers do not wait for each other,
    so do as many workers as there are layers."""
    workers = -(-num_workers // num_layers) if is_one_shot else num_workers
    return 1 if workers == 1 else _LANES_PER_WORKER * workers


@dataclass(frozen=True)
class _Steps:
    run: Run
    target: Target
    part: Part
    needs: LayerNeeds

    @property
    def is_one_shot(self) -> bool:
        return self.target.variant.refit.mode == "one_shot"

    @property
    def shards(self) -> range:
        return range(self.run.config.calibration.num_shards)

    @property
    def tokens_dir(self) -> str:
        return self.run.part("prepare", "calibration").dir

    def of_experts(self, layer: int, num_slots: int) -> Iterator[Unit]:
        """Gather, compare, start, choose, solve; the source's stream goes through the next layer meanwhile; advance."""
        run, data, refit, folder = self.run, self.run.config.calibration, self.target.variant.refit, Path(self.part.dir)
        score = SUPPORTED[run.survey.family].score if is_fitted(self.target) else None
        of = LayerArgs(
            self.tokens_dir, run.part("cluster", self.target.part).dir, layer, data.num_shards, data.micro_batch, score,
            self.is_one_shot, refit.shared_expert, shard_weights(run, self.target),
        )  # fmt: skip
        ridge, bounds = None if refit.ridge == "auto" else refit.ridge, Bounds.of(run.config.resources.worker_memory)
        width = (narrowed_to(run, self.target) or num_neurons(run.tensors)) if refit.neurons == "choose" else None
        names = (OWN, *self.target.variant.method.alternatives_in(self.target.format))
        pairs = pairs_of(run, self.target)
        has_start = width is not None or score is not None or pairs is not None or len(names) > 1
        given = [paths.given_file(folder, layer, shard) for shard in self.shards]
        gathered, made = list[Unit](), list[Unit]()
        for shard in self.shards:
            gathered.append(self._unit(
                layer, f"gather-{shard:04d}", shard, GATHER.on(GatherArgs(of, shard)), f"gather {shard + 1}/{data.num_shards}",
                reads=[*self._entering(layer, shard, is_source=self.is_one_shot),
                       *self._entering(layer + 1, shard, is_source=True)],
                writes=[given[shard]],
            ))  # fmt: skip
        yield from gathered
        losses = list[Path]()
        num_experts = run.survey.num_experts
        if pairs is not None and num_slots < num_experts:
            for expert in range(num_experts):
                if not (expert + 1) % (num_experts // pairs.num_runs):
                    continue  # the last of a run has no later one
                losses.append(paths.pairs_file(folder, layer, expert))
                yield self._unit(
                    layer, f"pairs-{expert:04d}", expert, COMPARE.on(CompareArgs(of, pairs, expert)),
                    f"pairs of expert {expert}", given, losses[-1:], beside_bytes=self.needs.start_bytes,
                )  # fmt: skip
        for number, name in enumerate(names if has_start else ()):
            start = [paths.start_file(folder, layer, name), paths.start_plan_file(folder, layer, name)]
            made.append(self._unit(
                layer, f"{name}/start", number, START.on(StartArgs(of, name, pairs if name == OWN else None)), f"start {name}",
                [*given, *(losses if name == OWN else ())], start, beside_bytes=self.needs.start_bytes,
            ))  # fmt: skip
        for name in names if width is not None else ():
            for rank in range(num_slots):
                start = [paths.start_file(folder, layer, name), paths.start_plan_file(folder, layer, name)]
                args = ChooseArgs(of, name, rank, width or 0, bounds.choice_columns)
                made.append(self._unit(
                    layer, f"{name}/slot-{rank:04d}", rank, CHOOSE.on(args),
                    f"neurons of slot {rank + 1}/{num_slots} by size, {name}", [*given, *start],
                    [paths.chosen_file(folder, layer, name, rank)], beside_bytes=self.needs.choose_bytes,
                ))  # fmt: skip
        yield from made
        solved = run.unit(
            self.part, f"layer-{layer:04d}", SOLVE.on(SolveArgs(of, names, ridge, bounds, has_start, width)),
            f"{self.target.part}, layer {layer}", reads=[*given, *(Path(path) for unit in made for path in unit.writes)],
            hold=self._hold(layer, "solve", 0), on_worker=True,
            memory_bytes=self._memory(layer, self.needs.solve_bytes),
        )  # fmt: skip
        yield solved
        if layer == run.survey.moe_layers[-1]:
            return
        if self.is_one_shot:
            yield from self.source(layer + 1)
        else:  # what the solution waits for, too: until then all workers have something to do
            yield from self.source(layer + 1, [made or gathered] * len(self.shards), is_ahead=True)
            yield from self._advance(layer, solved)

    def of_dense(self, layer: int) -> Iterator[Unit]:
        """Both streams pass; in one shot there is but the source's."""
        advanced = [] if self.is_one_shot else list(self._advance(layer))
        yield from advanced
        yield from self.source(layer + 1, [[unit] for unit in advanced])

    def source(self, layer: int, after: Sequence[Sequence[Unit]] = (), is_ahead: bool = False) -> Iterator[Unit]:
        """The source's stream through a layer. after: by token shard, units of the layer before that it waits for, so that it
        is at most a layer ahead of the student's stream. is_ahead: while that layer is solved, on a part of the workers."""
        num_holds = max(1, (self.run.num_workers or 1) // _AHEAD) if is_ahead else len(self.shards)
        for shard in self.shards:
            args = SourceArgs(self.tokens_dir, layer, shard, self.run.config.calibration.micro_batch)
            yield self._unit(
                layer, f"source-{shard:04d}", shard % num_holds, SOURCE.on(args), f"source {shard + 1}/{len(self.shards)}",
                self._entering(layer, shard, is_source=True), self._entering(layer + 1, shard, is_source=True),
                after[shard] if after else (),
            )  # fmt: skip

    def _advance(self, layer: int, solved: Unit | None = None) -> Iterator[Unit]:
        for shard in self.shards:
            args = AdvanceArgs(self.tokens_dir, layer, shard, self.run.config.calibration.micro_batch, solved is not None)
            yield self._unit(
                layer, f"advance-{shard:04d}", shard, ADVANCE.on(args), f"advance {shard + 1}/{len(self.shards)}",
                self._entering(layer, shard, is_source=False), self._entering(layer + 1, shard, is_source=False),
                [] if solved is None else [solved],
            )  # fmt: skip

    def _unit(
        self, layer: int, name: str, number: int, call: Call, label: str, reads: Sequence[Path], writes: Sequence[Path],
        after: Sequence[Unit] = (), beside_bytes: int = 0,
    ) -> Unit:  # fmt: skip
        """beside_bytes: memory of what it holds beside the layer, if that is much."""
        return self.run.unit(
            self.part, f"layer-{layer:04d}/{name}", call, f"{self.target.part}, layer {layer}, {label}",
            reads=reads, writes=writes, after=after, hold=self._hold(layer, call.function, number), on_worker=True,
            memory_bytes=self._memory(layer, beside_bytes),
        )  # fmt: skip

    def _memory(self, layer: int, beside_bytes: int) -> int:
        return layer_bytes(self.run, layer, beside_bytes)

    def _hold(self, layer: int, step: str, number: int) -> Hold:
        """Of the layer, which a worker that has it open does not open again; one a lane and step, so that no hold waits for a
        later one. The source's stream has its own even with one lane where the layer before is advanced after it."""
        run, part = self.run, self.part
        lanes = num_lanes(run.num_workers or 1, len(run.survey.moe_layers), self.is_one_shot)
        is_shared = lanes == 1 and (self.is_one_shot or step != SOURCE.function)
        of_step = "" if is_shared else f":{step}:{number % lanes}"
        key = f"{run.run_dir}/{part.dir}:{layer}{of_step}"
        call = OPEN.on(LayerShardArgs(str(run.model), layer, layer + 1, run.config.resources.num_cpus))
        return Hold(key, call, str(run.run_dir), f"{part.stage} {self.target.part}, layer {layer}")

    def _entering(self, layer: int, shard: int, is_source: bool) -> list[Path]:
        """Hidden states as they enter a layer, the source's or the student's; none at the first, which embeds the tokens."""
        file_of = paths.hidden_file if is_source else paths.student_file
        return [file_of(Path(self.part.dir), layer, shard)] if layer else []
