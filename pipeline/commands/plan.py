"""`plan`: what a run would do and need, from config, headers and texts alone. Starts no process and writes nothing."""

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from pipeline.checks import check, check_layers, check_mtp
from pipeline.config import RunConfig, hub_dir, texts_of
from pipeline.display.printing import add_row
from pipeline.display.sizes import human_bytes
from pipeline.display.tables import weights_lines
from pipeline.driver.worker import resolve
from pipeline.hub import headers_of
from pipeline.run.graph import tokens_args
from pipeline.run.partition import held_bytes, layer_shards
from pipeline.run.stage_keys import Stages
from stages.io.storage import absolute
from stages.merge.layout import output_files


def describe_plan(config: RunConfig) -> Iterator[Table | str]:
    """Lines and tables for the terminal; of a hub model only headers and small files are fetched, to a temporary folder.

    Raises InputError for anything that would stop a run.
    """
    with headers_of(config.model, config.revision) as folder:
        yield from _describe(config, folder)


def _describe(config: RunConfig, folder: Path) -> Iterator[Table | str]:
    checked = check(config, folder)
    stages, run_dir, model = Stages(config, checked.identities), absolute(config.run_dir), checked.model
    plan, rows = resolve("stages.prepare.stage:survey_tables")(str(model))
    check_layers(config, len(plan["moe_layers"]))
    check_mtp(config, plan)
    for place in texts_of(config):
        if place not in checked.datasets:
            resolve("stages.prepare.stage:sequences")(tokens_args(config, place, model, checked.identities[place]))
    num_workers = config.resources.num_workers or 1
    num_layers, num_moe = plan["num_layers"], len(plan["moe_layers"])

    yield (
        f"{config.model}: {plan['architecture']}, {num_layers} layers ({num_moe} MoE), {plan['num_experts']} experts, "
        f"top-{plan['top_k']}, {plan['num_parameters']:,} parameters, {human_bytes(plan['total_bytes'])}, {plan['dtype']}"
    )
    yield from weights_lines(plan)
    targets = Table("target", "experts a layer", "files", "bytes", title=None)
    num_files, written = 0, 0
    for target in stages.targets:
        counts = (target.num_experts,) * num_moe if isinstance(target.num_experts, int) else target.num_experts
        merged = dict(zip(plan["moe_layers"], counts, strict=True))
        files = output_files(
            rows, plan["num_experts"], merged, target.format, config.export.max_file_bytes, config.export.dtype
        )
        num_files += len(files)
        num_bytes = sum(file.num_bytes for file in files)
        written += num_bytes
        add_row(targets, (target.name, target.num_experts, len(files), human_bytes(num_bytes)))
    yield targets

    calibration = layer_shards(plan, config.calibration, config.resources, num_workers)
    units = Table("stage", "units", "runs on", title=None)
    units.add_row("prepare", str(3 if config.evaluation else 2), "CPU")
    units.add_row(
        "calibrate",
        f"{len(calibration)} layer shards x {config.calibration.num_shards} token shards + {num_moe} layers",
        "workers",
    )
    units.add_row("cluster", f"{num_moe} layers", "CPU")
    units.add_row("merge", f"{num_files} files", "workers")
    units.add_row("assemble", f"{len(stages.targets)} checkpoints", "CPU")
    if config.evaluation is not None:
        evaluation = layer_shards(plan, config.evaluation, config.resources, num_workers)
        num_models = 1 + len(stages.targets)
        shards = f"{num_models} models x {len(evaluation)} layer shards x {config.evaluation.num_shards} token shards"
        units.add_row("evaluate", f"{shards} + {num_models} scores", "workers")
    units.add_row("report", "1", "CPU")
    yield units

    itemsize = 4 if plan["dtype"] == "float32" else 2
    needed = max(held_bytes(plan, layers, config.calibration) for layers in calibration)
    tokens = config.calibration.num_sequences * config.calibration.sequence_length
    hidden = tokens * plan["hidden_size"] * itemsize * (len(calibration) > 1)
    first, stop = calibration[0]
    yield f"layers of a layer shard: {stop - first} (counted for {num_workers} worker; resources.layers_per_shard sets it)"
    worker_memory = config.resources.worker_memory
    yield f"memory of a worker: about {human_bytes(needed)} of resources.worker_memory {human_bytes(worker_memory)}"
    if needed > worker_memory:
        yield "  that is more, since a worker holds at least one layer; lower tokens_per_shard or use a larger worker"
    yield f"disk in {run_dir}: {human_bytes(written)} for checkpoints, meanwhile {human_bytes(2 * hidden)} for hidden states"
    for place, dataset in checked.datasets.items():
        if dataset.note:
            yield dataset.note
        yield f"disk in {hub_dir(config)}: {place}.data {dataset}; only a run downloads and reads them"
