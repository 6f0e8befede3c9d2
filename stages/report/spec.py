"""The stage report: writes every number of a run into one file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from stages.contracts.keys import Part
from stages.contracts.paths import REPORT_FILE, documents_file
from stages.contracts.protection import PROTECT_UNIT, ProtectFacts
from stages.contracts.spec import Publication, Run, StagePlan, StageSpec, counts_of, narrowed_to
from stages.contracts.targets import NumExperts
from stages.contracts.tasks import sealed_requests, task_args, task_part
from stages.contracts.texts import sections_of, texts_in
from stages.contracts.units import Facts, Unit, UnitCall


@dataclass(frozen=True)
class ReportedTarget:
    """A finished checkpoint.

    name: name of its folder. target: its variant and number of experts. variant: empty if the run file lists none. path:
    relative to the run directory. assembled: facts of its folder. plan_dir: directory of its method's layer plans.
    evaluate_dir: directory of its scores, or None. generate_dir: directory of its answers to prompts, or None.
    dendrogram_dir: directory of its clustering's dendrograms and certainty, or None if its method has no dendrogram.
    unweighted_clusters: by layer, merged experts whose members got no token. num_neurons: of an expert, where it has fewer than
    the source's; then asked_experts and asked_width are what the run file asks for. budget: its kind; empty where all layers
    keep the same number. super_experts: by layer, experts that it keeps as they are; None where it protects none.
    """

    name: str
    target: str
    variant: str
    format: str
    num_experts: NumExperts
    num_merged: Mapping[int, int]
    path: str
    assembled: Facts
    plan_dir: str
    evaluate_dir: str | None
    generate_dir: str | None
    dendrogram_dir: str | None
    unweighted_clusters: Mapping[int, tuple[int, ...]]
    num_neurons: int | None
    asked_experts: NumExperts
    asked_width: float
    budget: str
    super_experts: Mapping[int, tuple[int, ...]] | None


@dataclass(frozen=True)
class ReportedTask:
    """A task of the harness and a model. folder: of its results, relative to the run directory; None if it has failed. failure:
    why."""

    model: str
    task: str
    folder: str | None
    failure: str | None


@dataclass(frozen=True)
class ReportArgs:
    """Inputs of a report.

    survey_dir: relative to the run directory. source_name, source_path: name and path of the model. source_evaluate_dir:
    directory of the model's scores, or None. source_generate_dir: of its answers to prompts, or None. never_routed: by layer,
    experts to which no calibration token was routed. is_sampled: whether standard errors are known. calibrate_dir, domains:
    directory of the evidence, and the domains that it is kept by, which may be none. tasks: of every model. documents: by
    section, files with the fingerprints of its documents. settings: the run file. versions: versions of the libraries that
    computed each part.
    """

    survey_dir: str
    source_name: str
    source_path: str
    source_evaluate_dir: str | None
    source_generate_dir: str | None
    targets: tuple[ReportedTarget, ...]
    never_routed: Mapping[int, tuple[int, ...]]
    is_sampled: bool
    calibrate_dir: str
    domains: tuple[str, ...]
    tasks: tuple[ReportedTask, ...]
    documents: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, JsonValue]
    versions: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class ReportFacts:
    """num_models: number of models in the report. failure: which tasks it lacks; None if none. While there is one, every run
    makes the report again."""

    num_models: int
    failure: str | None


_LAYER_AND_INDICES = TypeAdapter(tuple[int, tuple[int, ...]])

REPORT = UnitCall("stages.report.units:report_unit", ReportArgs, ReportFacts)


class Report(StageSpec):
    """Writes every number of a run into one file."""

    name = "report"
    version = 4
    libraries = ("numpy", "scipy")
    after = ("prepare", "requests", "calibrate", "cluster", "merge", "assemble", "evaluate")

    def parts(self, run: Run) -> Iterator[Part]:
        """One part. The report shows exactly the settings in its key. Both leave out `resources`, which change no result."""
        upstream = {part.full_name: part for stage in ("assemble", "evaluate") for part in run.parts(stage)}
        yield run.new_part(self, "", {"run": _shown_settings(run)}, upstream)

    def units(self, run: Run) -> Iterator[Unit]:
        """One unit."""
        args = ReportArgs(
            survey_dir=run.part("prepare", "model").dir,
            source_name=run.config.name,
            source_path=str(run.model),
            source_evaluate_dir=_dir_of(run, "evaluate", "source"),
            source_generate_dir=_dir_of(run, "evaluate", "generate-source"),
            targets=tuple(_reported(run)),
            never_routed=_by_layer(run, "calibrate", run.part("calibrate").dir, "never_routed"),
            is_sampled=run.config.calibration.sampling is not None,
            calibrate_dir=run.part("calibrate").dir,
            domains=run.config.calibration.domains,
            tasks=tuple(_reported_tasks(run)),
            documents={
                section: tuple(
                    documents_file(Path(run.part("prepare", section).dir), text.domain).as_posix()
                    for text in texts_in(section, data)
                )
                for section, data in sections_of(run.config).items()
            },
            settings=_shown_settings(run),
            versions=run.library_versions(),
        )
        yield run.unit(run.part(self.name), "report", REPORT.on(args), REPORT_FILE)

    def plan(self, run: Run) -> StagePlan:
        """One unit."""
        return StagePlan("1", "CPU")

    def publications(self, run: Run) -> Iterator[Publication]:
        """The report file, and for each model the results of tasks as the harness writes them."""
        folder = run.part(self.name).dir
        yield Publication(f"{folder}/{REPORT_FILE}", REPORT_FILE, is_folder=False)
        if task_args(run.config):
            for name in (run.config.name, *(target.name for target in run.targets)):
                yield Publication(f"{folder}/{harness_file(name)}", harness_file(name), is_folder=False)


def _shown_settings(run: Run) -> dict[str, JsonValue]:
    return run.config.model_dump(mode="json", exclude={"resources"})


def _dir_of(run: Run, stage: str, name: str) -> str | None:
    return next((part.dir for part in run.parts(stage) if part.name == name), None)


def _by_layer(run: Run, stage: str, part_dir: str, fact: str) -> dict[int, tuple[int, ...]]:
    """Lists of indices that units report in the fact named `fact`, by layer. Layers with empty lists are left out."""
    found: dict[int, tuple[int, ...]] = {}
    for unit in run.units(stage):
        sealed = run.sealed(unit) if unit.part_dir == part_dir else None
        if sealed is not None and fact in sealed.facts:
            layer, indices = _LAYER_AND_INDICES.validate_python((sealed.facts["layer"], sealed.facts[fact]))
            if indices:
                found[layer] = indices
    return found


def _super_experts(run: Run, part_dir: str) -> dict[int, tuple[int, ...]] | None:
    """Protected experts of a target by layer; None where it protects none."""
    for unit in run.units("cluster"):
        if unit.part_dir == part_dir and unit.name == PROTECT_UNIT:
            sealed = run.sealed(unit)
            assert sealed is not None, unit.id
            found: dict[int, tuple[int, ...]] = {}
            for layer, expert in TypeAdapter(ProtectFacts).validate_python(sealed.facts).experts:
                found[layer] = (*found.get(layer, ()), expert)
            return found
    return None


def _reported(run: Run) -> Iterator[ReportedTarget]:
    assembled = {unit.part_dir: run.sealed(unit) for unit in run.units("assemble")}
    for target in run.targets:
        sealed = assembled[run.part("assemble", target.part).dir]
        assert sealed is not None, target.name
        yield ReportedTarget(
            name=target.name,
            target=target.label,
            variant=target.variant.name,
            format=target.format,
            num_experts=target.kept_experts(run.survey.num_experts),
            num_merged=counts_of(run, target),
            path=f"models/{target.name}",
            assembled=sealed.facts,
            plan_dir=run.part("cluster", target.part).dir,
            evaluate_dir=_dir_of(run, "evaluate", target.part),
            generate_dir=_dir_of(run, "evaluate", f"generate-{target.part}"),
            dendrogram_dir=_dir_of(run, "cluster", target.variant.name),
            unweighted_clusters=_by_layer(run, "cluster", run.part("cluster", target.part).dir, "unweighted_slots"),
            num_neurons=narrowed_to(run, target),
            asked_experts=target.num_experts,
            asked_width=target.width,
            budget=target.variant.kind.name if target.variant.kind.costs is not None else "",
            super_experts=_super_experts(run, run.part("cluster", target.part).dir),
        )


def harness_file(model: str) -> str:
    """File with the harness's results for a model, in the folder of the report and in the run directory."""
    return f"harness/{model}.json"


def _reported_tasks(run: Run) -> Iterator[ReportedTask]:
    names = {"source": run.config.name, **{target.part: target.name for target in run.targets}}
    requests, sealed = sealed_requests(run), {}
    for unit in run.units("evaluate"):
        if unit.name == "scores":
            sealed[unit.part_dir] = run.sealed(unit)
    for args in task_args(run.config):
        for part_name, model in names.items():
            part = run.part("evaluate", task_part(args.task, part_name))
            found = sealed.get(part.dir)
            failure = requests[args.task].failure
            if failure is None:
                assert found is not None, part.dir
                failure = TypeAdapter(str | None).validate_python(found.facts["failure"])
            yield ReportedTask(model, args.task, None if failure else part.dir, failure)


SPEC = Report()
