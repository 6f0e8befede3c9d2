"""Stage specs: what a stage declares of itself, and what it is told of a run. No torch.

The pipeline knows stages by these specs alone. It lists their parts, runs their units and publishes what they name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from pydantic import JsonValue

from stages.checkpoint.folder import Checkpoint
from stages.contracts.keys import Identity, Part
from stages.contracts.method import Methods
from stages.contracts.settings import RunConfig, Section
from stages.contracts.survey import Survey
from stages.contracts.targets import NumExperts, Target, Variant
from stages.contracts.tensors import TensorRow
from stages.contracts.units import Call, Facts, Hold, Unit

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Sealed:
    """What is recorded of a finished unit: SHA-256 by path of its files (relative to the run directory), and its facts."""

    files: Mapping[str, str]
    facts: Facts


@dataclass(frozen=True)
class Publication:
    """A finished result that a user looks for by name.

    source: a folder or file, relative to the run directory. name: a folder appears under `models/` by this name, a file at the
    top of the run directory.
    """

    source: str
    name: str
    is_folder: bool


@dataclass(frozen=True)
class PlannedCheckpoint:
    """A checkpoint that a run would write."""

    name: str
    num_experts: NumExperts
    num_files: int
    num_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """What a stage tells in `plan`.

    units: how many, in words; empty where there is none. runs_on: "CPU" or "workers". lines: what else to tell. checkpoints:
    that the stage writes. disk_bytes: that it needs for a time only.
    """

    units: str
    runs_on: str
    lines: Sequence[str] = ()
    checkpoints: Sequence[PlannedCheckpoint] = ()
    disk_bytes: int = 0


class Run(Protocol):
    """A run as a stage sees it."""

    @property
    def config(self) -> RunConfig:
        """The run file."""

    def section(self, name: str, kind: type[S]) -> S:
        """A section of the run file that a stage has declared in its `sections`."""

    @property
    def run_dir(self) -> Path:
        """The run directory, absolute."""

    @property
    def model(self) -> Path:
        """The checkpoint folder, absolute."""

    @property
    def num_workers(self) -> int | None:
        """Workers there will be; None where the run is only looked at, and nothing may be written."""

    @property
    def variants(self) -> Sequence[Variant]:
        """Ways from evidence to checkpoints; one where the run file lists none."""

    @property
    def targets(self) -> Sequence[Target]:
        """Checkpoints to be made."""

    @property
    def survey(self) -> Survey:
        """Of the checkpoint. Raises InputError before it is sealed."""

    @property
    def tensors(self) -> Sequence[TensorRow]:
        """Tensors of the checkpoint. Raises InputError before the survey is sealed."""

    def identity(self, place: str) -> Identity:
        """What the model ("model") or a text (its section) is: digests, or a commit of the hub."""

    def text_files(self, place: str) -> Sequence[str]:
        """Paths of a text's files and folders."""

    def dataset_commit(self, place: str) -> str | None:
        """Commit of a text that is a dataset of the hub; None for files."""

    def new_part(self, spec: "StageSpec", name: str, settings: Mapping[str, JsonValue], upstream: Mapping[str, Part]) -> Part:
        """A part of a stage, with a key of its version, its libraries, the settings that it reads and the parts that it
        reads."""

    def part(self, stage: str, name: str = "") -> Part:
        """A part that this or an earlier stage has declared."""

    def parts(self, stage: str) -> Sequence[Part]:
        """All parts that a stage has declared, in order."""

    def all_parts(self) -> Sequence[Part]:
        """All parts of all stages that have declared theirs, in order."""

    def library_versions(self) -> Mapping[str, Mapping[str, str]]:
        """Versions of the libraries that compute each part, by its full name."""

    def unit(
        self, part: Part, name: str, call: Call, label: str, *, reads: Iterable[Path] = (), writes: Iterable[Path] = (),
        after: Iterable[Unit] = (), hold: Hold | None = None, on_worker: bool = False, memory_bytes: int = 0,
    ) -> Unit:  # fmt: skip
        """A unit of a part (see `Unit`). reads, writes: relative to the run directory."""

    def units(self, stage: str) -> Sequence[Unit]:
        """Units of a stage, done or not."""

    def sealed(self, unit: Unit) -> Sealed | None:
        """What is recorded of a unit; None before it is finished."""


class StageSpec(ABC):
    """A stage.

    Subclasses set name (also of its folder under `stages/`), version (raised when it computes something else from the same
    inputs: old results are then not reused), and libraries (those that compute its numbers; what only stores or moves them is
    left out).

    after: stages that are finished before this one's units are listed. beside: stages whose units are listed before this one's,
    so that its units may wait for single units of theirs (`Unit.after`) while those stages still run.
    makes_survey: whether `Run.survey` can be read once it is finished.
    sections: sections of the run file beyond those of `RunConfig` that it reads.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    libraries: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    makes_survey: ClassVar[bool] = False
    sections: ClassVar[Mapping[str, type[Section]]] = {}

    @abstractmethod
    def parts(self, run: Run) -> Iterable[Part]:
        """Declare the stage's parts (`Run.new_part`); known from run file and identities alone."""

    @abstractmethod
    def units(self, run: Run) -> Iterable[Unit]:
        """All units, done or not, in the order in which one worker would run them."""

    @abstractmethod
    def plan(self, run: Run) -> StagePlan:
        """Rows for `plan`; the survey can be read."""

    def methods(self) -> Methods:
        """Methods that a variant may choose, by name."""
        return {}

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Raise InputError for what cannot be, as far as run file and config.json tell. The first check of all."""
        return

    def check_surveyed(self, run: Run) -> None:
        """Raise InputError for what the survey shows to be impossible."""
        return

    def remarks(self, run: Run) -> Iterable[str]:
        """Lines for the log, once the survey can be read."""
        return ()

    def rehearsals(self, run: Run) -> Iterable[Call]:
        """What `plan` calls to find mistakes that a run would meet in its first units; what it returns is not used."""
        return ()

    def publications(self, run: Run) -> Iterable[Publication]:
        """What is published once the stage is finished."""
        return ()
