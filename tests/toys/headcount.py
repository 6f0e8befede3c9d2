"""A stage: counts the tensors of every checkpoint, each as soon as its own folder is assembled."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from stages.checkpoint.folder import Checkpoint
from stages.contracts.keys import Part
from stages.contracts.paths import CHECKPOINT_DIR
from stages.contracts.section import Section
from stages.contracts.spec import Publication, Run, StagePlan, StageSpec
from stages.contracts.units import Job, Unit, UnitCall, UnitResult
from stages.io.files import write_json

FILE = "headcount.json"


class Headcount(Section):
    """The section `headcount` of a run file."""

    unit: str = "tensors"
    """What is counted, as the file says it."""


@dataclass(frozen=True)
class CountArgs:
    """folder: of the checkpoint, relative to the run directory."""

    folder: str
    unit: str


@dataclass(frozen=True)
class CountFacts:
    """count: of tensors."""

    count: int


def count_unit(job: Job[CountArgs]) -> UnitResult[CountFacts]:
    count = len(Checkpoint(job.run_dir / job.args.folder).tensors)
    return UnitResult(CountFacts(count), [write_json(job.part_dir / FILE, {job.args.unit: count})])


COUNT = UnitCall("tests.toys.headcount:count_unit", CountArgs, CountFacts)


class CountStage(StageSpec):
    name = "headcount"
    version = 1
    after = ("prepare", "merge")
    beside = ("assemble",)
    sections: ClassVar = {"headcount": Headcount}

    def parts(self, run: Run) -> Iterator[Part]:
        for target in run.targets:
            settings = run.section("headcount", Headcount).model_dump()
            yield run.new_part(self, target.part, settings, {"model": run.part("assemble", target.part)})

    def units(self, run: Run) -> Iterator[Unit]:
        unit = run.section("headcount", Headcount).unit
        for target in run.targets:
            assembled = run.part("assemble", target.part).dir
            before = [one for one in run.units("assemble") if one.part_dir == assembled]
            call = COUNT.on(CountArgs(f"{assembled}/{CHECKPOINT_DIR}", unit))
            yield run.unit(run.part(self.name, target.part), "count", call, target.name, after=before)

    def plan(self, run: Run) -> StagePlan:
        return StagePlan(f"{len(run.targets)} checkpoints", "CPU")

    def publications(self, run: Run) -> Iterator[Publication]:
        yield Publication(f"{run.part(self.name, run.targets[0].part).dir}/{FILE}", FILE, is_folder=False)


SPEC = CountStage()
