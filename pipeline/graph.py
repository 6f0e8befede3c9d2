"""The units of each stage of a run. Stages run one after another; a stage's units are known once the one before is sealed."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, TextData
from pipeline.manifest import read_manifest
from pipeline.partition import LayerRange, layer_shards
from pipeline.stage_keys import Stages, StageRun, TargetRun
from pipeline.units import Hold, Unit
from stages.common import paths
from stages.common.files import write_json
from stages.merge.layout import output_files, read_tensor_rows


class Graph:
    """Units of one run.

    run_dir: absolute. model: the checkpoint folder. num_workers: how many workers there are, for the size of layer shards.
    """

    def __init__(self, config: RunConfig, stages: Stages, run_dir: Path, model: Path, num_workers: int) -> None:
        self.config, self.stages = config, stages
        self.run_dir, self.model, self.num_workers = run_dir, model, num_workers

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The survey's `plan.json`."""
        return json.loads((self.run_dir / self.stages.survey.dir / paths.PLAN_FILE).read_text())  # type: ignore[no-any-return]

    @cached_property
    def _tensor_rows(self) -> list[dict[str, Any]]:
        return read_tensor_rows(self.run_dir / self.stages.survey.dir / paths.TENSORS_FILE)

    def units(self, stage: str) -> list[Unit]:
        """All units of a stage, done or not, in the order in which one worker would run them."""
        return getattr(self, f"_{stage}")()  # type: ignore[no-any-return]

    def _prepare(self) -> list[Unit]:
        survey = Unit(
            "prepare", self.stages.survey.dir, "survey", "stages.prepare.stage:survey_unit", {"model": str(self.model)},
            label="checkpoint",
        )  # fmt: skip
        units = [survey, self._tokens_unit(self.stages.calibration, "calibration", self.config.calibration)]
        if self.stages.evaluation and self.config.evaluation:
            units.append(self._tokens_unit(self.stages.evaluation, "evaluation", self.config.evaluation))
        return units

    def _tokens_unit(self, stage: StageRun, place: str, data: TextData) -> Unit:
        settings = data.model_dump(include={"text_field", "revision", "num_sequences", "sequence_length", "seed"})
        files = [str(Path(name).resolve()) if Path(name).exists() else name for name in data.data]
        args = {
            **settings,
            "place": place,
            "model": str(self.model),
            "data": files,
            "sequences_per_shard": data.sequences_per_shard,
        }
        return Unit("prepare", stage.dir, "tokens", "stages.prepare.stage:tokens_unit", args, label=f"{place} tokens")

    def _partition(self, stage: StageRun, plan: Mapping[str, Any], data: TextData) -> list[LayerRange]:
        """The layer shards of a stage. Kept in its directory: a rerun on another number of workers resumes the same units."""
        path = self.run_dir / stage.dir / "partition.json"
        asked = self.config.resources.model_dump(include={"worker_memory", "layers_per_shard"})
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["asked"] == asked:
                return [(first, stop) for first, stop in kept["layer_shards"]]
        shards = layer_shards(plan, data, self.config.resources, self.num_workers)
        write_json(path, {"asked": asked, "layer_shards": shards})
        return shards

    def _through_layers(
        self, stage: StageRun, tokens: StageRun, data: TextData, shards: list[LayerRange], hold_call: str, unit_call: str,
        hold_args: Mapping[str, Any], what: str,
    ) -> list[Unit]:  # fmt: skip
        """Units (layer shard, token shard); each reads the hidden states that the one before it wrote."""
        units = []
        stage_dir = Path(stage.dir)
        for first, stop in shards:
            args = {**hold_args, "first": first, "stop": stop, "num_threads": self.config.resources.num_cpus}
            hold = Hold(f"{stage.dir}:{first}-{stop}", hold_call, args)
            is_last = stop == shards[-1][1]
            for shard in range(data.num_shards):
                reads = [paths.hidden_file(stage_dir, first, shard)] if first else []
                writes = [] if is_last else [paths.hidden_file(stage_dir, stop, shard)]
                if stage.stage == "calibrate":
                    layers = [layer for layer in self.plan["moe_layers"] if first <= layer < stop]
                    writes += [paths.partial_statistics_file(stage_dir, layer, shard) for layer in layers]
                units.append(
                    Unit(
                        stage.stage,
                        stage.dir,
                        # what is sealed for good is not named after the cut: another cut does not make it again
                        f"layers-{first:04d}-{stop:04d}/tokens-{shard:04d}" if writes else f"tokens-{shard:04d}",
                        unit_call,
                        {"tokens_dir": tokens.dir, "shard": shard, "micro_batch": data.micro_batch, "is_last": is_last},
                        label=f"{what}layers {first}-{stop - 1}, tokens {shard + 1}/{data.num_shards}",
                        reads=tuple(path.as_posix() for path in reads),
                        writes=tuple(path.as_posix() for path in writes),
                        hold=hold,
                        on_worker=True,
                    )
                )
        return units

    def _calibrate(self) -> list[Unit]:
        stage, data = self.stages.calibrate, self.config.calibration
        shards = self._partition(stage, self.plan, data)
        hold_args = {"model": str(self.model), "routers": self.plan["routers"]}
        units = self._through_layers(
            stage, self.stages.calibration, data, shards,
            "stages.calibrate.stage:open_shard", "stages.calibrate.stage:calibrate_unit", hold_args, "",
        )  # fmt: skip
        last_moe = max(self.plan["moe_layers"])
        units = [unit for unit in units if unit.hold is not None and unit.hold.args["first"] <= last_moe]
        for layer in self.plan["moe_layers"]:
            partials = [paths.partial_statistics_file(Path(stage.dir), layer, shard) for shard in range(data.num_shards)]
            units.append(
                Unit(
                    "calibrate", stage.dir, f"layer-{layer:04d}", "stages.calibrate.stage:reduce_unit",
                    {"layer": layer, "num_shards": data.num_shards},
                    label=f"layer {layer}, sum over token shards",
                    reads=tuple(path.as_posix() for path in partials),
                )
            )  # fmt: skip
        return units

    def _cluster(self) -> list[Unit]:
        settings = self.config.clustering.model_dump(exclude={"num_experts"})
        args = {**settings, "statistics_dir": self.stages.calibrate.dir}
        return [
            Unit(
                "cluster", self.stages.cluster.dir, f"layer-{layer:04d}", "stages.cluster.stage:cluster_unit",
                {**args, "layer": layer}, label=f"layer {layer}",
            )
            for layer in self.plan["moe_layers"]
        ]  # fmt: skip

    def num_merged(self, target: TargetRun) -> dict[str, int]:
        """Merged experts r of each MoE layer; JSON wants the layers as strings."""
        layers = self.plan["moe_layers"]
        counts = (target.num_experts,) * len(layers) if isinstance(target.num_experts, int) else target.num_experts
        return {str(layer): count for layer, count in zip(layers, counts, strict=True)}

    def _merge(self) -> list[Unit]:
        return [unit for target in self.stages.targets for unit in self._merge_units(target)]

    def _merge_units(self, target: TargetRun) -> list[Unit]:
        num_merged = self.num_merged(target)
        counts = {int(layer): count for layer, count in num_merged.items()}
        bound = self.config.export.max_file_bytes
        files = output_files(self._tensor_rows, self.plan["num_experts"], counts, target.format, bound)
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
            "max_file_bytes": bound,
            "num_threads": self.config.resources.num_cpus,
        }
        return [
            Unit(
                "merge", target.merge.dir, file.name, "stages.merge.stage:merge_unit", {**args, "file": number},
                label=f"{target.name}/{file.name}, {file.num_bytes:,} bytes", on_worker=True,
            )
            for number, file in enumerate(files)
        ]  # fmt: skip

    def _assemble(self) -> list[Unit]:
        return [self._assemble_unit(target) for target in self.stages.targets]

    def _assemble_unit(self, target: TargetRun) -> Unit:
        files = {}
        for unit in self._merge_units(target):
            manifest = read_manifest(self.run_dir, unit)
            assert manifest is not None, unit.id
            files |= {Path(path).name: recorded["sha256"] for path, recorded in manifest.files.items()}
        config, data = self.config, self.config.calibration
        card = {
            "name": target.name,
            "source": config.model,
            "revision": f" (revision {config.revision})" if config.revision else "",
            "num_experts": self.plan["num_experts"],
            "experts_text": str(target.num_experts),
            "source_parameters": self.plan["num_parameters"],
            "source_bytes": self.plan["total_bytes"],
            "router": config.export.router,
            "calibration": f"{data.num_sequences} sequences of {data.sequence_length} tokens of {', '.join(data.data)}, "
            f"seed {data.seed}",
            "clustering": ", ".join(f"{k} {v}" for k, v in config.clustering.model_dump(exclude={"num_experts"}).items()),
            "merging": config.merging.method,
        }
        args = {
            "model": str(self.model),
            "merge_dir": target.merge.dir,
            "files": files,
            "num_merged": self.num_merged(target),
            "format": target.format,
            "card": card,
        }
        return Unit(
            "assemble", target.assemble.dir, "checkpoint", "stages.assemble.stage:assemble_unit", args, label=target.name
        )

    def checkpoint_dir(self, target: TargetRun) -> Path:
        """Where a target's finished folder lies."""
        return self.run_dir / target.assemble.dir / paths.CHECKPOINT_DIR

    def _evaluate(self) -> list[Unit]:
        if self.stages.evaluate_source is None:
            return []
        units = self._evaluate_units(self.stages.evaluate_source, self.model, self.config.model_name)
        for target in self.stages.targets:
            assert target.evaluate is not None
            units += self._evaluate_units(target.evaluate, self.checkpoint_dir(target), target.name)
        return units

    def _evaluate_units(self, stage: StageRun, model: Path, name: str) -> list[Unit]:
        data = self.config.evaluation
        assert data is not None and self.stages.evaluation is not None
        shards = self._partition(stage, self.plan, data)
        units = self._through_layers(
            stage, self.stages.evaluation, data, shards,
            "stages.common.layer_shard:open_layer_shard", "stages.evaluate.stage:evaluate_unit",
            {"checkpoint_folder": str(model)}, f"{name}, ",
        )  # fmt: skip
        score = Unit(
            "evaluate", stage.dir, "perplexity", "stages.evaluate.stage:score_unit", {"num_shards": data.num_shards},
            label=f"{name}, perplexity", after=tuple(unit.id for unit in units if not unit.writes),
        )  # fmt: skip
        return [*units, score]

    def _report(self) -> list[Unit]:
        unweighted: dict[str, dict[str, Any]] = {}
        for target in self.stages.targets:
            found: dict[str, set[int]] = {}
            for unit in self._merge_units(target):
                manifest = read_manifest(self.run_dir, unit)
                for layer, clusters in (manifest.facts["unweighted_clusters"] if manifest else {}).items():
                    found.setdefault(layer, set()).update(clusters)
            unweighted[target.name] = {layer: sorted(clusters) for layer, clusters in found.items()}
        targets = []
        for target in self.stages.targets:
            manifest = read_manifest(self.run_dir, self._assemble_unit(target))
            assert manifest is not None
            targets.append(
                {
                    "name": target.name,
                    "target": target.target,
                    "format": target.format,
                    "num_experts": target.num_experts,
                    **manifest.facts,
                    "path": f"models/{target.name}",
                    "evaluate_dir": target.evaluate.dir if target.evaluate else None,
                    "unweighted_clusters": unweighted[target.name],
                }
            )
        reduces = {unit.args["layer"]: unit for unit in self._calibrate() if not unit.writes}
        manifests = {layer: read_manifest(self.run_dir, unit) for layer, unit in reduces.items()}
        never = {str(layer): m.facts["never_routed"] for layer, m in manifests.items() if m and m.facts["never_routed"]}
        source_stage = self.stages.evaluate_source
        args = {
            "survey_dir": self.stages.survey.dir,
            "source": {
                "name": self.config.model_name,
                "path": str(self.model),
                "evaluate_dir": source_stage.dir if source_stage else None,
            },
            "targets": targets,
            "never_routed": never,
            "settings": self.config.model_dump(mode="json"),
        }
        return [Unit("report", self.stages.report.dir, "report", "stages.report.stage:report_unit", args, label="report.json")]
