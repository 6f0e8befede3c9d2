"""The stage report: writes every number of a run into one file, and the page that shows them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from stages.contracts.keys import Part
from stages.contracts.paths import REPORT_FILE, REPORT_PAGE_FILE, documents_file
from stages.contracts.protection import PROTECT_UNIT, ProtectFacts
from stages.contracts.spec import Publication, Run, StagePlan, StageSpec, counts_of, narrowed_to, plans_of
from stages.contracts.target_settings import NumExperts
from stages.contracts.tasks import sealed_requests, task_args, task_part
from stages.contracts.texts import sections_of, texts_in, texts_of
from stages.contracts.units import Facts, Unit, UnitCall


@dataclass(frozen=True)
class ComparedPlans:
    """chosen: name of the plan of a layer that was taken. errors: of every plan, by name, as shares of that of no experts."""

    chosen: str
    errors: Mapping[str, float]


@dataclass(frozen=True)
class LayerRefit:
    """error_before, error_after: of the layer's output before and after refit, squared, over that of giving nothing. is_joint:
    whether W_down of all its slots was solved together, and not slot after slot (Gauss-Seidel)."""

    error_before: float
    error_after: float
    is_joint: bool


@dataclass(frozen=True)
class ReportedTarget:
    """A finished checkpoint.

    name: name of its folder. target: its variant and number of experts. variant: empty if the run file lists none. path:
    relative to the run directory. assembled: facts of its folder. plan_dir: directory of its method's layer plans.
    evaluate_dir: directory of its scores, or None. generate_dir: directory of its answers to prompts, or None.
    dendrogram_dir: directory of its clustering's dendrograms and certainty, or None if its method has no dendrogram.
    unweighted_clusters: by layer, merged experts whose members got no token. packing_errors: by layer, root of the squared
    change of new experts by packing them in the source's scheme, relative to their values; empty where nothing is packed.
    num_neurons: of an expert, where it has fewer than the source's; then asked_experts and asked_width are what the run file
    asks for. budget: its kind; empty where all layers keep the same number. super_experts: by layer, experts that it keeps as
    they are; None where it protects none. compared: by layer, where a refit has compared several plans, the one that it took,
    and the errors of all on held-out calibration text. final_plan_dir: directory of its layer plans as refit leaves them.
    refits: by layer, what refit has reached; empty without.
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
    packing_errors: Mapping[int, float]
    final_plan_dir: str
    refits: Mapping[int, LayerRefit]
    num_neurons: int | None
    asked_experts: NumExperts
    asked_width: float
    budget: str
    super_experts: Mapping[int, tuple[int, ...]] | None
    compared: Mapping[int, ComparedPlans]


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
    computed each part. identities: of the model and of each text. part_dirs: directories of all parts of the run.
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
    identities: Mapping[str, Mapping[str, JsonValue]]
    part_dirs: tuple[str, ...]


@dataclass(frozen=True)
class ReportFacts:
    """num_models: number of models in the report. failure: which tasks it lacks; None if none. While there is one, every run
    makes the report again."""

    num_models: int
    failure: str | None


_PACKED = TypeAdapter(list[dict[str, float]])
_LAYER_AND_INDICES = TypeAdapter(tuple[int, tuple[int, ...]])


@dataclass(frozen=True)
class _Solved:
    """What refit reports of a layer, as far as it is shown."""

    layer: int
    error_before: float
    error_after: float
    is_joint: bool
    chosen: str = ""
    compared: tuple[tuple[str, float], ...] = ()


_SOLVED = TypeAdapter(_Solved)
REPORT = UnitCall("stages.report.units:report_unit", ReportArgs, ReportFacts)


class Report(StageSpec):
    """Writes every number of a run into one file, and the page that shows them."""

    name = "report"
    version = 8
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
            identities={place: run.identity(place) for place in ("model", *texts_of(run.config))},
            part_dirs=tuple(part.dir for part in run.all_parts()),
        )
        yield run.unit(run.part(self.name), "report", REPORT.on(args), REPORT_FILE)

    def plan(self, run: Run) -> StagePlan:
        """One unit."""
        return StagePlan("1", "CPU")

    def publications(self, run: Run) -> Iterator[Publication]:
        """The report file and page, and for each model the results of tasks as the harness writes them."""
        folder = run.part(self.name).dir
        for name in (REPORT_FILE, REPORT_PAGE_FILE):
            yield Publication(f"{folder}/{name}", name, is_folder=False)
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


def _packing_errors(run: Run, part_dir: str) -> dict[int, float]:
    """Relative errors of packing by layer, over the files of a target in their order."""
    values, errors = dict[int, float](), dict[int, float]()
    for unit in run.units("merge"):
        sealed = run.sealed(unit) if unit.part_dir == part_dir else None
        for found in _PACKED.validate_python(sealed.facts.get("packed_anew", ()) if sealed is not None else ()):
            layer = found["layer"]
            values[int(layer)] = values.get(int(layer), 0.0) + found["squared_values"]
            errors[int(layer)] = errors.get(int(layer), 0.0) + found["squared_error"]
    return {layer: math.sqrt(errors[layer] / values[layer]) if values[layer] else 0.0 for layer in sorted(values)}


def _solved(run: Run, part_dir: str) -> list[_Solved]:
    """What refit reports of the layers of a target; empty without refit."""
    facts = [sealed.facts for unit in run.units("recombine") if unit.part_dir == part_dir and (sealed := run.sealed(unit))]
    return [_SOLVED.validate_python(one) for one in facts if "error_before" in one]


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
        solved = _solved(run, plans_of(run, target).dir)
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
            packing_errors=_packing_errors(run, run.part("merge", target.part).dir),
            final_plan_dir=plans_of(run, target).dir,
            refits={one.layer: LayerRefit(one.error_before, one.error_after, one.is_joint) for one in solved},
            unweighted_clusters=_by_layer(run, "cluster", run.part("cluster", target.part).dir, "unweighted_slots"),
            num_neurons=narrowed_to(run, target),
            asked_experts=target.num_experts,
            asked_width=target.width,
            budget=target.variant.kind.name if target.variant.kind.costs is not None else "",
            super_experts=_super_experts(run, run.part("cluster", target.part).dir),
            compared={one.layer: ComparedPlans(one.chosen, dict(one.compared)) for one in solved if one.compared},
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
