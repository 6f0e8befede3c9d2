"""Everything that can be checked before a process is started: run file against checkpoint, files, bounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, TextData, hub_dir, texts_of
from pipeline.hub import resolve_model
from pipeline.hub_data import Dataset, choose_files, fetch_files, is_dataset_name
from pipeline.run.identity import files_identity, model_identity
from pipeline.run.naming import is_hub_name
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.io.storage import absolute, as_path, check_readable, check_writable, is_remote, is_url
from stages.model.config_checks import check_config
from stages.model.families import family_of, num_experts_in, stock_targets, top_k_in


@dataclass(frozen=True)
class Checked:
    """A run that may start: the checkpoint folder (absolute), and the identities of model and texts.

    datasets: those of the hub, by the section that names them.
    """

    model: Path
    identities: Mapping[str, Mapping[str, Any]]
    datasets: Mapping[str, Dataset]


def check(config: RunConfig, folder: Path | None = None) -> Checked:
    """Check a run. folder: of the checkpoint, to look only; without it a hub model is fetched now, and datasets of the hub.

    Raises InputError for a checkpoint that is missing, damaged or not MoE, for a target out of bounds, for a missing text.
    """
    is_run = folder is None
    if folder is None:
        folder = _model_folder(config)
    checkpoint = Checkpoint(folder)
    place = str(checkpoint.folder)
    num_experts = num_experts_in(checkpoint.config, place)
    family_of(checkpoint.config, place)
    check_config(checkpoint)
    check_targets(config, num_experts, top_k_in(checkpoint.config, place))
    check_groups(config, stock_targets(checkpoint.config, place))
    identities: dict[str, Mapping[str, Any]] = {"model": model_identity(checkpoint)}
    datasets: dict[str, Dataset] = {}
    for place, data in texts_of(config).items():
        if is_dataset_name(data.data):
            datasets[place] = _dataset(config, place, data, is_run)
            identities[place] = {data.data[0]: datasets[place].identity}
        else:
            identities[place] = files_identity(data.data, place)
    return Checked(absolute(checkpoint.folder), identities, datasets)


def _dataset(config: RunConfig, place: str, data: TextData, is_run: bool) -> Dataset:
    run_dir = absolute(config.run_dir)
    if config.cache_dir is None and is_remote(run_dir):
        raise InputError(
            f"cache_dir is missing: {data.data[0]} is downloaded to files, and run_dir {run_dir} is object storage; give a "
            f"folder that every node reaches, or download the dataset and give its files"
        )
    dataset = choose_files(data.data[0], data.revision, data.seed, hub_dir(config), place)
    if is_run and not dataset.note:
        fetch_files(dataset, data.revision, hub_dir(config), place)
    return dataset


def _model_folder(config: RunConfig) -> Path:
    """The checkpoint folder, fetched if it is a hub model's. Raises InputError when a store does not answer."""
    run_dir = absolute(config.run_dir)
    check_writable(run_dir)
    if is_url(config.model):
        check_readable(as_path(config.model))
    elif is_hub_name(config.model) and config.cache_dir is None and is_remote(run_dir):
        raise InputError(
            f"cache_dir is missing: {config.model} is downloaded to files, and run_dir {run_dir} is object storage; give a "
            f"folder that every node reaches, or upload the model and give its URL"
        )
    return resolve_model(config.model, config.revision, hub_dir(config))


def check_targets(config: RunConfig, num_experts: int, top_k: int) -> None:
    """Raise InputError for a target with more experts than there are, or (stock) fewer than the router picks."""
    for target in config.clustering.num_experts:
        counts = (target,) if isinstance(target, int) else target
        if max(counts) > num_experts:
            raise InputError(
                f"clustering.num_experts is {max(counts)} but {config.model} has {num_experts} experts a layer; "
                f"use at most {num_experts}"
            )
        if "stock" in config.export.formats and min(counts) < top_k:
            raise InputError(
                f"clustering.num_experts is {min(counts)} but the router picks top_k={top_k} experts per token, so a stock "
                f"export needs at least {top_k}; raise it or set export.formats to [tied]"
            )


def check_groups(config: RunConfig, possible: list[int]) -> None:
    """Raise InputError for a stock target that does not divide into the groups of a group-limited router."""
    for target in config.clustering.num_experts:
        count = target if isinstance(target, int) else target[0]
        if "stock" in config.export.formats and count not in possible:
            raise InputError(
                f"clustering.num_experts is {count} but the router of {config.model} first picks groups of experts, which must "
                f"stay equally large in a stock export; use one of {', '.join(map(str, possible))}, "
                f"or set export.formats to [tied]"
            )


def check_layers(config: RunConfig, num_moe_layers: int) -> None:
    """Raise InputError for a target that lists a number of layers that the model does not have."""
    for target in config.clustering.num_experts:
        if isinstance(target, tuple) and len(target) != num_moe_layers:
            raise InputError(
                f"clustering.num_experts has a target with {len(target)} numbers but {config.model} has {num_moe_layers} "
                f"MoE layers; give one number for each"
            )


def check_mtp(config: RunConfig, plan: Mapping[str, Any]) -> None:
    """Raise InputError for a checkpoint with layers that predict further tokens, if the run file refuses them."""
    if plan["mtp_tensors"] and config.export.mtp == "error":
        raise InputError(
            f"{plan['first_mtp_tensor']} (and {plan['mtp_tensors'] - 1} more) predicts further tokens (MTP), and export.mtp is "
            f"error; set it to drop to leave these layers out"
        )
