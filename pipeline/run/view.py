"""A run as its stages see it: run file, model, parts with their keys, and sealed units."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from pipeline import __version__
from pipeline.hub_data import dataset_paths
from pipeline.run.variants import variants_of
from pipeline.state.manifest import read_manifest
from stages.contracts.errors import InputError
from stages.contracts.keys import Identity, Part
from stages.contracts.paths import SURVEY_FILE, TENSORS_FILE
from stages.contracts.section import Section
from stages.contracts.settings import RunConfig, hub_dir
from stages.contracts.spec import Sealed, StageSpec
from stages.contracts.survey import Survey, read_survey
from stages.contracts.targets import Target, Variant, targets_of
from stages.contracts.tensors import TensorRow, read_tensors
from stages.contracts.texts import texts_of
from stages.contracts.units import Call, Hold, Unit
from stages.contracts.widths import ExpertSizes
from stages.io.storage import absolute
from stages.io.untrusted import read_small
from stages.registry import stage_specs

S = TypeVar("S", bound=Section)


@cache
def library_version(name: str) -> str:
    """Installed version of a library, read without importing it. The build suffix after "+" (cpu, cu128) is dropped: the
    driver's build may differ from that of the workers, and a run may be inspected on a machine without a GPU."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"  # a run can be inspected without its libraries


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run: the absolute checkpoint folder, and identities of the model and the texts. The identities are keyed by
    "model" and by the place in the run file that names each text. expert_sizes: as `Run.expert_sizes`."""

    model: Path
    identities: Mapping[str, Identity]
    expert_sizes: ExpertSizes | None = None


class RunView:
    """Implements `stages.contracts.spec.Run`.

    num_workers: None for inspection only. run_dir: present location of the run directory, if it was moved. surveyed: survey and
    tensors of a checkpoint, for a run without a sealed survey. Raises InputError when two targets have the same name.
    """

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        num_workers: int | None = None,
        surveyed: tuple[Survey, Sequence[TensorRow]] | None = None,
        run_dir: Path | None = None,
    ) -> None:
        self.config, self.inputs, self.num_workers = config, inputs, num_workers
        self.run_dir, self.model = run_dir or absolute(config.run_dir), inputs.model
        self.expert_sizes = inputs.expert_sizes
        self.variants: Sequence[Variant] = variants_of(config)
        self.targets: Sequence[Target] = targets_of(config.name, self.variants)
        (name, count), *_ = Counter(target.name for target in self.targets).most_common(1)
        if count > 1:
            raise InputError(
                f"clustering.num_experts has two targets whose name would be {name}; run them in two run directories"
            )
        self.specs = stage_specs()
        self._surveyed = surveyed
        self._parts: dict[tuple[str, str], Part] = {}
        self._units: dict[str, Sequence[Unit]] = {}
        for spec in self.specs:
            for part in spec.parts(self):
                assert self._parts.get((spec.name, part.name)) is part, f"{part.full_name} was not made by new_part"

    def section(self, name: str, kind: type[S]) -> S:
        """A section of the run file that a stage has declared in its `sections`."""
        value = getattr(self.config, name)
        assert isinstance(value, kind), name
        return value

    def identity(self, place: str) -> Identity:
        """Identity of the model (place "model") or of a text (place: where the run file names it)."""
        return self.inputs.identities[place]

    def text_files(self, place: str) -> list[str]:
        """Paths of a text's files and folders."""
        text, identity = texts_of(self.config)[place], self.identity(place)
        return [str(path) for name in text.data for path in self._paths(name, identity)]

    def _paths(self, name: str, identity: Identity) -> list[Path]:
        dataset = identity.get(name)
        if isinstance(dataset, Mapping):
            return dataset_paths(hub_dir(self.config), name.partition(":")[0], dataset)
        return [Path(name).expanduser().absolute()]

    def dataset_commit(self, place: str) -> str | None:
        """Commit of a text that is a hub dataset; None for files."""
        (first, *_) = self.identity(place).values()
        return str(first["commit"]) if isinstance(first, Mapping) else None

    def new_part(self, spec: StageSpec, name: str, settings: Mapping[str, JsonValue], upstream: Mapping[str, Part]) -> Part:
        """A new part of a stage, with its identity."""
        libraries: dict[str, JsonValue] = {"hcsmoe": __version__, **{one: library_version(one) for one in spec.libraries}}
        identity: Identity = {
            "stage": spec.name,
            "version": spec.version,
            "libraries": libraries,
            "settings": dict(settings),
            "upstream": {role: part.key for role, part in upstream.items()},
        }
        assert (spec.name, name) not in self._parts, f"{spec.name} declares two parts named {name!r}"
        self._parts[spec.name, name] = Part(spec.name, name, identity)
        return self._parts[spec.name, name]

    def part(self, stage: str, name: str = "") -> Part:
        """A part that has been declared before."""
        return self._parts[stage, name]

    def parts(self, stage: str) -> list[Part]:
        """All parts that a stage has declared."""
        return [part for part in self._parts.values() if part.stage == stage]

    def all_parts(self) -> list[Part]:
        """All parts of all stages, in order."""
        return list(self._parts.values())

    def library_versions(self) -> dict[str, Mapping[str, str]]:
        """Versions of the libraries that compute each part, by its full name."""
        versions: dict[str, Mapping[str, str]] = {}
        for part in self._parts.values():
            libraries = part.identity["libraries"]
            assert isinstance(libraries, dict)
            versions[part.full_name] = {name: str(version) for name, version in libraries.items()}
        return versions

    def unit(
        self,
        part: Part,
        name: str,
        call: Call,
        label: str,
        *,
        reads: Iterable[Path] = (),
        writes: Iterable[Path] = (),
        after: Iterable[Unit] = (),
        hold: Hold | None = None,
        on_worker: bool = False,
        memory_bytes: int = 0,
    ) -> Unit:
        """A unit of a part."""
        return Unit(
            str(self.run_dir),
            part.stage,
            part.dir,
            name,
            call,
            label,
            tuple(path.as_posix() for path in reads),
            tuple(path.as_posix() for path in writes),
            tuple(unit.id for unit in after),
            hold,
            on_worker,
            memory_bytes,
        )

    def units(self, stage: str) -> Sequence[Unit]:
        """All units of a stage, done or not, in the order in which one worker would run them."""
        if stage not in self._units:
            (spec,) = [spec for spec in self.specs if spec.name == stage]
            self._units[stage] = list(spec.units(self))
        return self._units[stage]

    def sealed(self, unit: Unit) -> Sealed | None:
        """The record of a sealed unit; None before the unit is sealed."""
        manifest = read_manifest(unit)
        if manifest is None:
            return None
        return Sealed({path: recorded.sha256 for path, recorded in manifest.files.items()}, manifest.facts)

    @cached_property
    def _survey_part(self) -> tuple[StageSpec, Mapping[str, str], str]:
        """The stage that makes the survey, the digests of its sealed files by path, and the directory of the survey."""
        (spec,) = [spec for spec in self.specs if spec.makes_survey]
        part = self.parts(spec.name)[0]
        files: dict[str, str] = {}
        for unit in self.units(spec.name):
            sealed = self.sealed(unit) if unit.part_dir == part.dir else None
            files |= sealed.files if sealed is not None else {}
        return spec, files, part.dir

    @cached_property
    def survey(self) -> Survey:
        """The survey. Raises InputError unless the file has its sealed digest."""
        if self._surveyed is not None:
            return self._surveyed[0]
        spec, files, folder = self._survey_part
        path = self.run_dir / folder / SURVEY_FILE
        content = read_small(path) if path.exists() else b""
        if files.get(f"{folder}/{SURVEY_FILE}") != hashlib.sha256(content).hexdigest():
            raise InputError(f"{path} is not what the survey wrote; run again with --from {spec.name}")
        return read_survey(content, path)

    @cached_property
    def tensors(self) -> Sequence[TensorRow]:
        """Tensors of the checkpoint. Raises InputError unless the file has its sealed digest."""
        if self._surveyed is not None:
            return self._surveyed[1]
        return read_tensors(self.run_dir / self._survey_part[2] / TENSORS_FILE)
