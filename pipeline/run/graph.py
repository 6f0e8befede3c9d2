"""The units of each stage of a run. Stages run one after another; a stage's units are known once the one before is sealed."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.config import RunConfig, TextData, hub_dir, texts_of
from pipeline.driver.units import Hold, Unit
from pipeline.hub_data import dataset_paths
from pipeline.run.card_facts import card_facts
from pipeline.run.partition import LayerRange, held_bytes, layer_shards, read_partition
from pipeline.run.stage_keys import StageRun, Stages, TargetRun
from pipeline.state.manifest import read_manifest
from stages.contracts import paths
from stages.contracts.errors import InputError
from stages.contracts.tensors import TensorRow, read_tensors
from stages.io.files import write_json
from stages.io.untrusted import read_small
from stages.merge.layout import output_files

PARTITION_FILE = "partition.json"


def tokens_args(config: RunConfig, place: str, model: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What `stages.prepare.stage.sequences` is given for a text. identity: of the text; it names the files of a dataset."""
    data = texts_of(config)[place]
    settings = data.model_dump(include={"text_field", "num_sequences", "sequence_length", "seed"})
    files = [str(path) for name in data.data for path in _paths(config, name, identity)]
    return {
        **settings, "place": place, "model": str(model), "data": files, "trust_remote_code": config.trust_remote_code,
    }  # fmt: skip


def _paths(config: RunConfig, name: str, identity: Mapping[str, Any]) -> list[Path]:
    if name in identity:
        return dataset_paths(hub_dir(config), name.partition(":")[0], identity[name])
    return [Path(name).expanduser().absolute()]


class Graph:
    """Units of one run.

    run_dir: absolute. model: the checkpoint folder. num_workers: how many workers there are, for the size of layer shards;
    None to look only: nothing is written then.
    """

    def __init__(self, config: RunConfig, stages: Stages, run_dir: Path, model: Path, num_workers: int | None) -> None:
        self.config, self.stages = config, stages
        self.run_dir, self.model, self.num_workers = run_dir, model, num_workers

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The survey's `plan.json`. Raises InputError unless it is the file that the survey has sealed."""
        relative = f"{self.stages.survey.dir}/{paths.PLAN_FILE}"
        path = self.run_dir / relative
        manifest = read_manifest(self.survey_unit())
        sealed = manifest.files.get(relative) if manifest is not None else None
        content = read_small(path) if path.exists() else b""
        if sealed is None or hashlib.sha256(content).hexdigest() != sealed.sha256:
            raise InputError(f"{path} is not what the survey wrote; run again with --from prepare")
        return json.loads(content)  # type: ignore[no-any-return]

    def units(self, stage: str) -> list[Unit]:
        """All units of a stage, done or not, in the order in which one worker would run them."""
        return getattr(self, f"_{stage}")()  # type: ignore[no-any-return]

    def _unit(self, stage: StageRun, name: str, call: str, args: Mapping[str, Any], label: str, **options: Any) -> Unit:
        function = f"stages.{stage.stage}.stage:{call}"
        return Unit(str(self.run_dir), stage.stage, stage.dir, name, function, args, label, **options)

    # prepare

    def _prepare(self) -> list[Unit]:
        units = [
            self.survey_unit(),
            self._tokens_unit(self.stages.calibration, "calibration", self.config.calibration),
        ]
        if self.stages.evaluation and self.config.evaluation:
            units.append(self._tokens_unit(self.stages.evaluation, "evaluation", self.config.evaluation))
        return units

    def survey_unit(self) -> Unit:
        """The unit that writes the plan."""
        return self._unit(self.stages.survey, "survey", "survey_unit", {"model": str(self.model)}, "checkpoint")

    def _tokens_unit(self, stage: StageRun, place: str, data: TextData) -> Unit:
        args = {
            **tokens_args(self.config, place, self.model, self.stages.identities[place]),
            "sequences_per_shard": data.sequences_per_shard,
        }
        return self._unit(stage, "tokens", "tokens_unit", args, f"{place} tokens")

    # calibrate and evaluate: token shards through layer shards

    def _partition(self, stage: StageRun, data: TextData) -> list[LayerRange]:
        """The layer shards of a stage. Kept in its directory: a rerun on another number of workers resumes the same units."""
        path = self.run_dir / stage.dir / PARTITION_FILE
        asked = self.config.resources.model_dump(include={"worker_memory", "layers_per_shard"})
        kept = read_partition(path, self.plan["num_layers"])
        if kept is not None and kept.asked == asked:
            return kept.layer_shards
        shards = layer_shards(self.plan, data, self.config.resources, self.num_workers or 1)
        if self.num_workers is not None:
            write_json(path, {"asked": asked, "layer_shards": shards})
        return shards

    def _through_layers(
        self,
        stage: StageRun,
        call: str,
        tokens: StageRun,
        data: TextData,
        hold_call: str,
        hold_args: Mapping[str, Any],
        what: str,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Unit]:
        """Units (layer shard, token shard); each reads the hidden states that the one before it wrote."""
        units = []
        stage_dir = Path(stage.dir)
        for first, stop in self._partition(stage, data):
            args = {**hold_args, "first": first, "stop": stop, "num_threads": self.config.resources.num_cpus}
            key = f"{self.run_dir}/{stage.dir}:{first}-{stop}"
            hold = Hold(key, hold_call, args, str(self.run_dir), f"{stage.stage} {what}layers {first}-{stop - 1}")
            is_last = stop == self.plan["num_layers"]
            for shard in range(data.num_shards):
                reads = [paths.hidden_file(stage_dir, first, shard)] if first else []
                writes = [] if is_last else [paths.hidden_file(stage_dir, stop, shard)]
                if stage.stage == "calibrate":
                    layers = [layer for layer in self.plan["moe_layers"] if first <= layer < stop]
                    writes += [paths.partial_statistics_file(stage_dir, layer, shard) for layer in layers]
                unit = self._unit(
                    stage,
                    # what is sealed for good is not named after the cut: another cut does not make it again
                    f"layers-{first:04d}-{stop:04d}/tokens-{shard:04d}" if writes else f"tokens-{shard:04d}",
                    call,
                    {"tokens_dir": tokens.dir, "shard": shard, "micro_batch": data.micro_batch, "is_last": is_last, **more},
                    f"{what}layers {first}-{stop - 1}, tokens {shard + 1}/{data.num_shards}",
                    reads=tuple(path.as_posix() for path in reads),
                    writes=tuple(path.as_posix() for path in writes),
                    hold=hold,
                    on_worker=True,
                    memory_bytes=held_bytes(self.plan, (first, stop), data),
                )
                units.append(unit)
        return units

    def _calibrate(self) -> list[Unit]:
        stage, data = self.stages.calibrate, self.config.calibration
        hold_args = {"model": str(self.model), "routers": self.plan["routers"]}
        units = self._through_layers(
            stage, "calibrate_unit", self.stages.calibration, data, "stages.calibrate.stage:open_shard", hold_args, "",
            {"sampling": self._sampling()},
        )  # fmt: skip
        units = [unit for unit in units if unit.writes]  # layers after the last MoE layer add nothing to the statistics
        held = {layer: unit.hold for unit in units if unit.hold for layer in range(*_layers(unit.hold))}
        for layer in self.plan["moe_layers"]:
            partials = [paths.partial_statistics_file(Path(stage.dir), layer, shard) for shard in range(data.num_shards)]
            reduce = self._unit(
                stage,
                f"layer-{layer:04d}",
                "reduce_unit",
                {"layer": layer, "num_shards": data.num_shards, "is_sampled": data.sampling is not None},
                f"layer {layer}, sum over token shards",
                reads=tuple(path.as_posix() for path in partials),
                hold=held[layer],  # it applies W_down, which that worker has
                on_worker=True,
            )
            units.append(reduce)
        return units

    def _sampling(self) -> dict[str, Any] | None:
        """What decides which tokens are sampled; None without sampling."""
        data = self.config.calibration
        if data.sampling is None:
            return None
        include = {"num_sequences", "sequence_length", "sequences_per_shard", "seed"}
        return {**data.sampling.model_dump(), **{name: getattr(data, name) for name in sorted(include)}}

    def _evaluate(self) -> list[Unit]:
        if self.stages.evaluate_source is None:
            return []
        units = self._evaluate_units(self.stages.evaluate_source, self.model, self.config.name)
        for target in self.stages.targets:
            assert target.evaluate is not None
            units += self._evaluate_units(target.evaluate, self.checkpoint_dir(target), target.name)
        return units

    def _evaluate_units(self, stage: StageRun, model: Path, name: str) -> list[Unit]:
        data = self.config.evaluation
        assert data is not None and self.stages.evaluation is not None
        units = self._through_layers(
            stage,
            "evaluate_unit",
            self.stages.evaluation,
            data,
            "stages.model.layer_shard:open_layer_shard",
            {"model": str(model)},
            f"{name}, ",
        )
        last = tuple(unit.id for unit in units if not unit.writes)
        args = {"num_shards": data.num_shards}
        return [*units, self._unit(stage, "perplexity", "score_unit", args, f"{name}, perplexity", after=last)]

    # cluster, merge, assemble, report

    def _cluster(self) -> list[Unit]:
        settings = self.config.clustering.model_dump(exclude={"num_experts"})
        data = self.config.calibration
        args = {**settings, "statistics_dir": self.stages.calibrate.dir, "is_sampled": data.sampling is not None}
        args["seed"] = data.seed
        return [
            self._unit(self.stages.cluster, f"layer-{layer:04d}", "cluster_unit", {**args, "layer": layer}, f"layer {layer}")
            for layer in self.plan["moe_layers"]
        ]

    def num_merged(self, target: TargetRun) -> dict[str, int]:
        """Merged experts r of each MoE layer; JSON wants the layers as strings."""
        layers = self.plan["moe_layers"]
        counts = (target.num_experts,) * len(layers) if isinstance(target.num_experts, int) else target.num_experts
        return {str(layer): count for layer, count in zip(layers, counts, strict=True)}

    def _merge(self) -> list[Unit]:
        return [unit for target in self.stages.targets for unit in self._merged[target.name]]

    @cached_property
    def _merged(self) -> dict[str, list[Unit]]:
        """Units of merge by target; what follows asks for them again."""
        rows = read_tensors(self.run_dir / self.stages.survey.dir / paths.TENSORS_FILE)
        return {target.name: self._merge_units(target, rows) for target in self.stages.targets}

    def _merge_units(self, target: TargetRun, rows: list[TensorRow]) -> list[Unit]:
        num_merged = self.num_merged(target)
        counts = {int(layer): count for layer, count in num_merged.items()}
        bound = self.config.export.max_file_bytes
        dtype = self.config.export.dtype
        files = output_files(rows, self.plan["num_experts"], counts, target.format, bound, dtype)
        args = {
            "model": str(self.model),
            "survey_dir": self.stages.survey.dir,
            "statistics_dir": self.stages.calibrate.dir,
            "labels_dir": self.stages.cluster.dir,
            "num_experts": self.plan["num_experts"],
            "num_merged": num_merged,
            "format": target.format,
            "method": self.config.merging.method,
            "router": self.config.export.router,
            "value_dtype": dtype,
            "max_file_bytes": bound,
            "num_threads": self.config.resources.num_cpus,
        }
        return [
            self._unit(
                target.merge,
                file.name,
                "merge_unit",
                {**args, "file": number},
                f"{target.name}/{file.name}, {file.num_bytes:,} bytes",
                on_worker=True,
            )
            for number, file in enumerate(files)
        ]

    def _assemble(self) -> list[Unit]:
        return [self._assemble_unit(target) for target in self.stages.targets]

    def _assemble_unit(self, target: TargetRun) -> Unit:
        files: dict[str, str] = {}
        for unit in self._merged[target.name]:
            manifest = read_manifest(unit)
            assert manifest is not None, unit.id
            files |= {Path(path).name: recorded.sha256 for path, recorded in manifest.files.items()}
        args = {
            "model": str(self.model),
            "merge_dir": target.merge.dir,
            "files": files,
            "num_merged": self.num_merged(target),
            "architecture": self.plan["architecture"],
            "format": target.format,
            "value_dtype": self.config.export.dtype,
            "card": card_facts(self.config, self.plan, target, self.model, self.stages.dataset_commit("calibration")),
        }
        return self._unit(target.assemble, "checkpoint", "assemble_unit", args, target.name)

    def checkpoint_dir(self, target: TargetRun) -> Path:
        """Where a target's finished folder lies."""
        return self.run_dir / target.assemble.dir / paths.CHECKPOINT_DIR

    def _report(self) -> list[Unit]:
        source = self.stages.evaluate_source
        args = {
            "survey_dir": self.stages.survey.dir,
            "source": {
                "name": self.config.name,
                "path": str(self.model),
                "evaluate_dir": source.dir if source else None,
            },
            "targets": [self._reported(target) for target in self.stages.targets],
            "never_routed": self._never_routed(),
            "certainty_dir": self.stages.cluster.dir if self.config.calibration.sampling else None,
            "settings": self.stages.report.identity["settings"]["run"],
            "versions": self.stages.versions,
        }
        return [self._unit(self.stages.report, "report", "report_unit", args, "report.json")]

    def _reported(self, target: TargetRun) -> dict[str, Any]:
        """What the report is told of a target: its place, and the facts in the manifests of merge and assemble."""
        assembled = read_manifest(self._assemble_unit(target))
        assert assembled is not None
        unweighted: dict[str, set[int]] = {}
        for unit in self._merged[target.name]:
            manifest = read_manifest(unit)
            assert manifest is not None
            for layer, clusters in manifest.facts["unweighted_clusters"].items():
                unweighted.setdefault(layer, set()).update(clusters)
        return {
            "name": target.name,
            "target": target.target,
            "format": target.format,
            "num_experts": target.num_experts,
            "num_merged": self.num_merged(target),
            **assembled.facts,
            "path": f"models/{target.name}",
            "evaluate_dir": target.evaluate.dir if target.evaluate else None,
            "unweighted_clusters": {layer: sorted(clusters) for layer, clusters in unweighted.items()},
        }

    def _never_routed(self) -> dict[str, list[int]]:
        """Experts that no calibration token was sent to, by layer."""
        never = {}
        for unit in self._calibrate():
            manifest = None if unit.writes else read_manifest(unit)
            if manifest is not None and manifest.facts["never_routed"]:
                never[str(unit.args["layer"])] = manifest.facts["never_routed"]
        return never


def _layers(hold: Hold) -> LayerRange:
    return hold.args["first"], hold.args["stop"]
