"""What the model card of an export states. It is published: nothing in it tells where files lie on this machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.run.naming import hub_name
from pipeline.run.stage_keys import TargetRun


def card_facts(
    config: RunConfig, plan: Mapping[str, Any], target: TargetRun, model: Path, commit: str | None
) -> dict[str, Any]:
    """Facts for `stages.assemble.card`, but for those of the written files.

    model: the checkpoint folder, absolute. commit: of the calibration text, if it is a dataset of the hub.
    """
    base_model = hub_name(str(model))
    data = config.calibration
    sampled = f"; un-routed means from {data.sampling.fraction:.0%} of the tokens" if data.sampling else ""
    clustering = config.clustering.model_dump(exclude={"num_experts"})
    return {
        "name": target.name,
        "source": base_model or config.name,
        "base_model": base_model,
        "revision": model.name if model.parent.name == "snapshots" else config.revision,
        "num_experts": plan["num_experts"],
        "experts_text": str(target.num_experts),
        "source_parameters": plan["num_parameters"],
        "source_bytes": plan["total_bytes"],
        "router": config.export.router,
        "calibration": f"{data.num_sequences} sequences of {data.sequence_length} tokens of "
        f"{', '.join(_labels(data.data, commit))}{f' (revision {commit})' if commit else ''}, seed {data.seed}{sampled}",
        "clustering": ", ".join(f"{key} {value}" for key, value in clustering.items()),
        "merging": config.merging.method,
        "settings": {**_settings(config, target, commit), "model": base_model or config.name},
    }


def _labels(data: Sequence[str], commit: str | None) -> list[str]:
    """Names of files, or a dataset of the hub as it is given."""
    return list(data) if commit else [Path(name).name for name in data]


def _settings(config: RunConfig, target: TargetRun, commit: str | None) -> dict[str, Any]:
    """The run file of one target alone: what the same command needs, beside the files, to make the same checkpoint."""
    settings = config.model_dump(mode="json", exclude={"run_dir", "cache_dir", "resources", "evaluation"}, exclude_none=True)
    settings["calibration"]["data"] = _labels(config.calibration.data, commit)
    settings["clustering"]["num_experts"] = [target.num_experts]
    settings["export"]["formats"] = [target.format]
    if commit:
        settings["calibration"]["revision"] = commit
    return settings
