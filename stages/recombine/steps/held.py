"""What a worker holds of a layer from one unit to the next.

Dimensions: D hidden size, S slots.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.checkpoint.folder import Checkpoint
from stages.contracts.layer_plan import LayerPlan, read_plan
from stages.contracts.paths import plan_file, replaced_file
from stages.contracts.stream_units import LayerShardArgs
from stages.contracts.units import Job
from stages.model.layer_shard import LayerShard
from stages.recombine.calls import OWN, LayerArgs
from stages.recombine.given import Given, Start, load_tensors, read_given
from stages.recombine.pairs import GroupLosses
from stages.recombine.solve import Problem
from stages.recombine.student import Student


class HeldLayer(LayerShard):
    """One decoder layer of the source, and what units of one part have made of it in this process."""

    _part: Path | None = None
    _solved: Student | None = None
    _given: Given | None = None
    losses: tuple[Path, GroupLosses] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._planned = dict[str, Student]()
        self._starts = dict[str, Start]()
        self._problems = dict[str, Problem]()

    def close(self) -> None:
        """Free all weights."""
        self._forget()
        super().close()

    def _forget(self) -> None:
        self.free_plans()
        self._starts, self._solved, self._given, self.losses = {}, None, None, None

    def _turn_to(self, part_dir: Path) -> None:
        if self._part != part_dir:
            self._forget()
        self._part = part_dir

    def planned(self, part_dir: Path, name: str, plan: LayerPlan) -> Student:
        """The layer with the experts of one of a part's plans, not yet solved. It is kept until another is asked for."""
        self._turn_to(part_dir)
        if name not in self._planned:
            self.free_plans()
            self._planned[name] = Student(self, self.first, plan)
        return self._planned[name]

    def free_plans(self) -> None:
        """Free the experts of a plan, and what its slots have to give."""
        self._planned, self._problems = {}, {}

    def given(self, part_dir: Path, of: LayerArgs) -> Given:
        """What all token shards have gathered, under the router of the method's own plan."""
        self._turn_to(part_dir)
        if self._given is None:
            self._given = read_given(part_dir, of.layer, of.num_shards, self.device)
        return self._given

    def start(self, part_dir: Path, name: str) -> Start:
        """What the step start has made of a plan."""
        self._turn_to(part_dir)
        if name not in self._starts:
            self._starts[name] = Start.read(part_dir, self.first, name, self.device)
        return self._starts[name]

    def started(self, part_dir: Path, name: str) -> Student:
        """The layer with the experts of a started plan."""
        return self.planned(part_dir, f"{name}, started", self.start(part_dir, name).plan)

    def problem(self, part_dir: Path, of: LayerArgs, name: str) -> Problem:
        """What the slots of a started plan have to give."""
        start = self.start(part_dir, name)
        if name not in self._problems:
            given = replace(self.given(part_dir, of), routed=start.routed)
            self._problems[name] = given.problem(self.started(part_dir, name), of.has_shared)
        return self._problems[name]

    def solved(self, part_dir: Path) -> Student:
        """The layer with the solved W_down of a part. What led to it is freed."""
        self._turn_to(part_dir)
        if self._solved is None:
            self._forget()
            values = load_tensors(replaced_file(part_dir, self.first))
            plan = read_plan(plan_file(part_dir, self.first))
            down_name = next(name for name in values if name.endswith(".down_proj"))
            student = Student(self, self.first, plan, {name: one for name, one in values.items() if name != down_name})
            assert down_name == student.down_name
            student.set_down(values[down_name])
            self._solved = student
        return self._solved


def open_layer(args: LayerShardArgs) -> HeldLayer:
    """Load one decoder layer."""
    return HeldLayer(Checkpoint(args.model), args.first, args.stop, args.num_threads, has_head=False)


def plan_of(job: Job[object], of: LayerArgs, name: str) -> LayerPlan:
    """A plan of the layer as cluster made it: the method's own, or an alternative, by its name."""
    folder = job.run_dir / of.plan_dir
    return read_plan(plan_file(folder if name == OWN else folder / name, of.layer))
