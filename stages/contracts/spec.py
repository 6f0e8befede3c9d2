"""Stage specs: the declarations of a stage, and its view of a run. No torch.

The pipeline knows stages only by these specs. It lists their parts, runs their units and publishes their results.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from pydantic import JsonValue, TypeAdapter

from stages.checkpoint.folder import Checkpoint
from stages.contracts.budget import BUDGET_UNIT, BudgetFacts, BudgetKinds
from stages.contracts.errors import InputError
from stages.contracts.keys import Identity, Part
from stages.contracts.method import Methods
from stages.contracts.section import Section
from stages.contracts.settings import RunConfig
from stages.contracts.survey import Survey
from stages.contracts.target_settings import NumExperts
from stages.contracts.targets import Target, Variant
from stages.contracts.tensors import TensorRow, num_neurons
from stages.contracts.texts import sections_of, texts_in, tokens_unit_name
from stages.contracts.units import Call, Facts, Hold, Unit
from stages.contracts.widths import ExpertSizes, kept_neurons

S = TypeVar("S", bound=Section)


@dataclass(frozen=True)
class Sealed:
    """The record of a finished unit: SHA-256 of its files by path (relative to the run directory), and its facts."""

    files: Mapping[str, str]
    facts: Facts


@dataclass(frozen=True)
class Publication:
    """A finished result that a user looks for by name.

    source: a folder or file, relative to the run directory. name: published name; a folder appears under `models/`, a file at
    the top of the run directory.
    """

    source: str
    name: str
    is_folder: bool


@dataclass(frozen=True)
class PlannedCheckpoint:
    """A checkpoint that a run would write. num_experts: a layer. num_neurons: of an expert, where it has fewer than before."""

    name: str
    num_experts: NumExperts
    num_neurons: int | None
    num_files: int
    num_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """A stage's lines in the output of `plan`.

    units: number of units, in words; empty if there are none. runs_on: "CPU" or "workers". lines: further lines. checkpoints:
    checkpoints that the stage writes. disk_bytes: temporary disk space that it needs.
    """

    units: str
    runs_on: str
    lines: Sequence[str] = ()
    checkpoints: Sequence[PlannedCheckpoint] = ()
    disk_bytes: int = 0


class Run(Protocol):
    """A run as its stages see it."""

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
        """Number of workers; None if the run is only inspected, and nothing may be written."""

    @property
    def variants(self) -> Sequence[Variant]:
        """The variants of the run; a single one if the run file lists none."""

    @property
    def targets(self) -> Sequence[Target]:
        """Checkpoints that the run makes."""

    @property
    def expert_sizes(self) -> ExpertSizes | None:
        """Sizes that config.json states, before there is a survey; None where it leaves them to a default."""

    @property
    def survey(self) -> Survey:
        """Survey of the checkpoint. Raises InputError before the survey is sealed."""

    @property
    def tensors(self) -> Sequence[TensorRow]:
        """Tensors of the checkpoint. Raises InputError before the survey is sealed."""

    def identity(self, place: str) -> Identity:
        """Identity of the model (place "model") or of a text (place: where the run file names it): digests, or a commit of the
        hub."""

    def text_files(self, place: str) -> Sequence[str]:
        """Paths of a text's files and folders."""

    def dataset_commit(self, place: str) -> str | None:
        """Commit of a text that is a hub dataset; None for files."""

    def new_part(self, spec: "StageSpec", name: str, settings: Mapping[str, JsonValue], upstream: Mapping[str, Part]) -> Part:
        """A new part of a stage. Its key depends on the stage's version and libraries, and the settings and parts it reads."""

    def part(self, stage: str, name: str = "") -> Part:
        """A part that this or an earlier stage has declared."""

    def parts(self, stage: str) -> Sequence[Part]:
        """All parts that a stage has declared, in order."""

    def all_parts(self) -> Sequence[Part]:
        """All parts declared so far, by all stages, in order."""

    def library_versions(self) -> Mapping[str, Mapping[str, str]]:
        """Versions of the libraries that compute each part, by the part's full name."""

    def unit(
        self, part: Part, name: str, call: Call, label: str, *, reads: Iterable[Path] = (), writes: Iterable[Path] = (),
        after: Iterable[Unit] = (), hold: Hold | None = None, on_worker: bool = False, memory_bytes: int = 0,
    ) -> Unit:  # fmt: skip
        """A new unit of a part. The arguments are the fields of `Unit`; reads and writes are relative to the run directory."""

    def units(self, stage: str) -> Sequence[Unit]:
        """Units of a stage, done or not."""

    def sealed(self, unit: Unit) -> Sealed | None:
        """The record of a finished unit; None before it is finished."""


def plans_of(run: Run, target: Target) -> Part:
    """The part that holds a target's layer plans: what its refit has made of them, or its method's own."""
    refitted = [part for part in run.parts("recombine") if part.name == target.part]
    return refitted[0] if refitted else run.part("cluster", target.part)


def text_facts(run: Run, section: str, fact: str) -> dict[str, int]:
    """A number that prepare found of the text of each domain of a section (`TokensFacts`), by domain; without those domains of
    which it is not known."""
    names = {tokens_unit_name(text.domain): text.domain for text in texts_in(section, sections_of(run.config)[section])}
    found: dict[str, int] = {}
    for unit in run.units("prepare"):
        sealed = run.sealed(unit) if unit.part_dir == run.part("prepare", section).dir else None
        value = sealed.facts.get(fact) if sealed is not None else None
        if isinstance(value, int):
            found[names[unit.name]] = value
    return found


def narrowed_to(run: Run, target: Target) -> int | None:
    """Neurons that each expert of a target keeps; None for all. Raises InputError as `kept_neurons` does."""
    return kept_width(target, run.survey, run.tensors)


def kept_width(target: Target, survey: Survey, tensors: Sequence[TensorRow]) -> int | None:
    """The same of the checkpoint that a survey and its tensors describe."""
    share = target.share(survey.num_experts)
    if share == 1:
        return None
    return kept_neurons(num_neurons(tensors), share, target.variant.refit.width_multiple)


def counts_of(run: Run, target: Target) -> dict[int, int]:
    """Experts that each MoE layer of a target keeps, by layer: what the target's budget has decided from the evidence, or what
    the run file says. Raises InputError before a budget has decided."""
    if target.variant.kind.costs is None:
        return target.counts(run.survey)
    part = run.part("cluster", target.part)
    (unit,) = (unit for unit in run.units("cluster") if unit.part_dir == part.dir and unit.name == BUDGET_UNIT)
    sealed = run.sealed(unit)
    if sealed is None:
        raise InputError(f"{part.dir}: the budget of {target.part} is not decided yet; run again with --from cluster")
    facts = TypeAdapter(BudgetFacts).validate_python(sealed.facts)
    return dict(zip(facts.layers, facts.num_slots, strict=True))


class StageSpec(ABC):
    """A stage.

    Subclasses set name (also the name of its folder under `stages/`), version, and libraries. Raise the version when the stage
    computes something else from the same inputs, so that old results are not reused. libraries lists those that compute the
    numbers, not those that only store or move them.

    after: stages that must finish before this stage's units are listed. beside: stages whose units must be listed first. A unit
    of this stage may then wait for single units of theirs (`Unit.after`) while those stages still run. makes_survey: whether
    `Run.survey` is readable once this stage has finished. sections: sections of the run file beyond those of `RunConfig` that
    the stage reads.
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
        """Declare the stage's parts with `Run.new_part`. They depend on the run file, the identities and
        `Run.expert_sizes` alone."""

    @abstractmethod
    def units(self, run: Run) -> Iterable[Unit]:
        """All units, done or not, in the order in which a single worker would run them."""

    @abstractmethod
    def plan(self, run: Run) -> StagePlan:
        """The stage's lines for `plan`. The survey is readable by then."""

    def methods(self) -> Methods:
        """Methods that a variant may choose, by name."""
        return {}

    def budgets(self) -> BudgetKinds:
        """Kinds of budgets that a variant may choose, by name."""
        return {}

    def check(self, config: RunConfig, targets: Sequence[Target], checkpoint: Checkpoint) -> None:
        """Raise InputError for settings that the run file and config.json show to be impossible.
        This is the first check of all."""
        return

    def check_surveyed(self, run: Run) -> None:
        """Raise InputError for settings that the survey shows to be impossible."""
        return

    def weights_bytes(self, target: Target, survey: Survey, tensors: Sequence[TensorRow]) -> int:
        """Bytes of the weight files that the stage would write for a target; 0 for a stage that writes none.
        Raises InputError for a width that is not possible."""
        return 0

    def remarks(self, run: Run) -> Iterable[str]:
        """Lines for the log, once the survey can be read."""
        return ()

    def rehearsals(self, run: Run) -> Iterable[Call]:
        """Calls that `plan` makes to find mistakes that a run would meet in its first units. Their results are ignored."""
        return ()

    def publications(self, run: Run) -> Iterable[Publication]:
        """Results to publish once the stage has finished."""
        return ()
