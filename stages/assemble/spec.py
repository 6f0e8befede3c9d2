"""The stage assemble: a complete, loadable checkpoint folder for every target."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.assemble.facts import CardFacts, card_facts
from stages.contracts.keys import Part
from stages.contracts.paths import CHECKPOINT_DIR
from stages.contracts.spec import Publication, Run, StagePlan, StageSpec, counts_of, narrowed_to
from stages.contracts.targets import Target
from stages.contracts.units import Unit, UnitCall


@dataclass(frozen=True)
class AssembleArgs:
    """Arguments for one target's folder.

    model: source folder. merge_dir: folder of the weight files, relative to the run directory. files: SHA-256 of the weight
    files by name. num_merged: experts that each MoE layer keeps. architecture: transformers class of the source. format: "tied"
    or "stock". value_dtype: of `export.dtype`. merges_mtp: whether `export.mtp` is merge. num_neurons: of an expert, where it
    has fewer than the source's.
    """

    model: str
    merge_dir: str
    files: Mapping[str, str]
    num_merged: Mapping[int, int]
    architecture: str
    format: str
    value_dtype: str
    merges_mtp: bool
    card: CardFacts
    num_neurons: int | None = None


@dataclass(frozen=True)
class AssembleFacts:
    """parameters, bytes: of the weights. left_behind: names of source files that are not exported."""

    parameters: int
    bytes: int
    left_behind: tuple[str, ...]


ASSEMBLE = UnitCall("stages.assemble.units:assemble_unit", AssembleArgs, AssembleFacts)


class Assemble(StageSpec):
    """Makes a complete, loadable checkpoint folder for every target."""

    name = "assemble"
    version = 7
    libraries = ("transformers",)
    after = ("prepare", "merge")

    def parts(self, run: Run) -> Iterator[Part]:
        """One part for each target."""
        for target in run.targets:
            settings = {"model": run.config.model, "revision": run.config.revision, "name": target.name}
            yield run.new_part(self, target.part, settings, {"merge": run.part("merge", target.part)})

    def units(self, run: Run) -> Iterator[Unit]:
        """One for each target."""
        merged: dict[str, dict[str, str]] = {}
        for unit in run.units("merge"):
            sealed = run.sealed(unit)
            assert sealed is not None, unit.id
            merged.setdefault(unit.part_dir, {}).update({Path(path).name: digest for path, digest in sealed.files.items()})
        for target in run.targets:
            yield _unit(run, target, merged[run.part("merge", target.part).dir])

    def plan(self, run: Run) -> StagePlan:
        """One unit for each target."""
        return StagePlan(f"{len(run.targets)} checkpoints", "CPU")

    def publications(self, run: Run) -> Iterator[Publication]:
        """Every target's folder."""
        for target in run.targets:
            yield Publication(f"{run.part(self.name, target.part).dir}/{CHECKPOINT_DIR}", target.name, is_folder=True)


def _unit(run: Run, target: Target, files: Mapping[str, str]) -> Unit:
    args = AssembleArgs(
        model=str(run.model),
        merge_dir=run.part("merge", target.part).dir,
        files=files,
        num_merged=counts_of(run, target),
        architecture=run.survey.architecture,
        format=target.format,
        value_dtype=target.variant.export.dtype,
        merges_mtp=target.merges_mtp,
        card=card_facts(run, target),
        num_neurons=narrowed_to(run, target),
    )
    return run.unit(run.part("assemble", target.part), "checkpoint", ASSEMBLE.on(args), target.name)


SPEC = Assemble()
