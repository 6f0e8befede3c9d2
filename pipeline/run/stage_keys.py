"""The stages of one run: their keys and directories, which follow from the settings alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from typing import Any

from pipeline import __version__
from pipeline.config import RunConfig, TextData
from pipeline.run.identity import key_of

# Raised when a stage computes something else from the same inputs: old results are then not reused.
VERSIONS = {"prepare": 3, "calibrate": 5, "cluster": 1, "merge": 2, "assemble": 5, "evaluate": 2, "report": 2}

# Libraries that compute a stage's numbers. What only stores or moves them is left out.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "prepare": ("numpy", "tokenizers", "transformers"),
    "calibrate": ("numpy", "torch", "transformers"),
    "cluster": ("numpy", "scipy"),
    "merge": ("numpy", "torch"),
    "assemble": ("transformers",),
    "evaluate": ("torch", "transformers"),
    "report": (),
}


@cache
def library_version(name: str) -> str:
    """The installed version, read without an import. The build after "+" (cpu, cu128) is left out: the driver's says nothing
    about a worker's device, and a run may be looked at from a machine without one."""
    try:
        return metadata.version(name).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"  # enough to look at a run


@dataclass(frozen=True)
class StageRun:
    """One stage of a run, or one part of it (a text, a target): `identity` is all that its result depends on."""

    stage: str
    part: str
    identity: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Hash of the identity."""
        return key_of(self.identity)

    @property
    def name(self) -> str:
        """Stage and part, without the key."""
        return f"{self.stage}-{self.part}" if self.part else self.stage

    @property
    def dir(self) -> str:
        """Its directory, relative to the run directory."""
        return f"{self.name}-{self.key}"


def _stage(stage: str, part: str, settings: Mapping[str, Any], **upstream: str) -> StageRun:
    identity = {
        "stage": stage,
        "version": VERSIONS[stage],
        "libraries": {"hcsmoe": __version__, **{name: library_version(name) for name in LIBRARIES[stage]}},
        "settings": dict(settings),
        "upstream": upstream,
    }
    return StageRun(stage, part, identity)


@dataclass(frozen=True)
class TargetRun:
    """One target in one format: its name under `models/`, what each MoE layer keeps, and its stages."""

    name: str
    target: str
    num_experts: int | tuple[int, ...]
    format: str
    merge: StageRun
    assemble: StageRun
    evaluate: StageRun | None


class Stages:
    """Every stage of a run.

    identities: of the model and of each text, from `pipeline.run.identity`.
    """

    def __init__(self, config: RunConfig, identities: Mapping[str, Mapping[str, Any]]) -> None:
        self.config = config
        self.identities = identities
        self.survey = _stage("prepare", "model", {"model": identities["model"]})
        self.calibration = self._tokens("calibration", config.calibration)
        self.evaluation = self._tokens("evaluation", config.evaluation) if config.evaluation else None
        sampling = config.calibration.sampling
        sampled = {"sampling": {**sampling.model_dump(), "seed": config.calibration.seed}} if sampling else {}
        self.calibrate = _stage("calibrate", "", sampled, model=self.survey.key, tokens=self.calibration.key)
        self.cluster = _stage(
            "cluster", "", config.clustering.model_dump(exclude={"num_experts"}), calibrate=self.calibrate.key
        )
        self.evaluate_source = self._evaluate("source", self.survey)
        self.targets = [
            self._target(target, export_format)
            for target in config.clustering.num_experts
            for export_format in config.export.formats
        ]

    def _tokens(self, part: str, data: TextData) -> StageRun:
        # `data` and `revision` say where a text is; what it is stands in its identity
        excluded = {"data", "revision", "metrics", "tokens_per_shard", "tokens_per_micro_batch", "sampling"}
        settings = data.model_dump(exclude=excluded)
        settings |= {
            "data": self.identities[part],
            "micro_batch": data.micro_batch,
            "sequences_per_shard": data.sequences_per_shard,
        }
        return _stage("prepare", part, settings, model=self.survey.key)

    def _evaluate(self, part: str, model: StageRun) -> StageRun | None:
        if self.evaluation is None or self.config.evaluation is None:
            return None
        return _stage("evaluate", part, {}, model=model.key, tokens=self.evaluation.key)

    def _target(self, num_experts: int | tuple[int, ...], export_format: str) -> TargetRun:
        config = self.config
        target = target_name(num_experts)
        part = f"{target}-{export_format}"
        settings: dict[str, Any] = {
            "num_experts": num_experts,
            "format": export_format,
            "method": config.merging.method,
            "max_file_bytes": config.export.max_file_bytes,
            "dtype": config.export.dtype,
        }
        if export_format == "stock":
            settings["router"] = config.export.router
        merge = _stage("merge", part, settings, cluster=self.cluster.key, calibrate=self.calibrate.key)
        name = f"{config.name}-{part}"
        card = {"model": config.model, "revision": config.revision, "name": name}
        assemble = _stage("assemble", part, card, merge=merge.key)
        return TargetRun(name, target, num_experts, export_format, merge, assemble, self._evaluate(part, assemble))

    def dataset_commit(self, part: str) -> str | None:
        """The commit of a text that is a dataset of the hub; None of files."""
        (first, *_) = self.identities[part].values()
        return str(first["commit"]) if isinstance(first, Mapping) else None

    @cached_property
    def report(self) -> StageRun:
        """The report depends on every result before it, and shows the settings that are in its key: `resources`, which change
        no result, are in neither."""
        upstream = {target.assemble.name: target.assemble.key for target in self.targets}
        evaluates = [self.evaluate_source, *(target.evaluate for target in self.targets)]
        upstream |= {stage.name: stage.key for stage in evaluates if stage is not None}
        return _stage("report", "", {"run": self.config.model_dump(mode="json", exclude={"resources"})}, **upstream)

    @property
    def versions(self) -> dict[str, Mapping[str, str]]:
        """Versions of the libraries that compute each stage, by the stage's name, for the report."""
        return {stage.name: stage.identity["libraries"] for stage in self.all()}

    def all(self) -> list[StageRun]:
        """Every stage, in the order in which they run."""
        stages: list[StageRun | None] = [self.survey, self.calibration, self.evaluation, self.calibrate, self.cluster]
        stages += [target.merge for target in self.targets] + [target.assemble for target in self.targets]
        stages += [self.evaluate_source, *(target.evaluate for target in self.targets), self.report]
        return [stage for stage in stages if stage is not None]


def target_name(num_experts: int | tuple[int, ...]) -> str:
    """`6e`, or for a number a layer its mean and a short hash, `5.25e-1f3a`."""
    if isinstance(num_experts, int):
        return f"{num_experts}e"
    return f"{sum(num_experts) / len(num_experts):.2f}e-{key_of({'num_experts': num_experts})[:4]}"
