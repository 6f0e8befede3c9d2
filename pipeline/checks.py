"""All checks that run before any process starts: the run file against the checkpoint, files, and bounds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.hub import resolve_model
from pipeline.hub_data import Dataset, choose_files, fetch_files, is_dataset_name
from pipeline.run.fit import with_fits
from pipeline.run.identity import files_identity, model_identity, tasks_identity
from pipeline.run.variants import variants_of
from pipeline.run.view import Inputs
from stages.checkpoint.folder import Checkpoint
from stages.contracts.errors import InputError
from stages.contracts.keys import Identity
from stages.contracts.naming import is_hub_name
from stages.contracts.settings import RunConfig, hub_dir, task_folder
from stages.contracts.targets import targets_of, with_counts
from stages.contracts.tasks import task_args
from stages.contracts.texts import Text, texts_of
from stages.io.storage import absolute, as_path, check_readable, check_writable, is_remote, is_url
from stages.model.config_checks import check_config
from stages.model.families import family_of, num_experts_in
from stages.model.widths import expert_sizes
from stages.registry import stage_specs


@dataclass(frozen=True)
class Checked:
    """A run that has passed all checks.

    config: the run, with every target as numbers of experts and widths. datasets: the hub datasets it reads, by the place in
    the run file that names each. remarks: lines on how targets were found.
    """

    config: RunConfig
    inputs: Inputs
    datasets: Mapping[str, Dataset]
    remarks: tuple[str, ...] = ()


def check(config: RunConfig, folder: Path | None = None) -> Checked:
    """Check a run.

    folder: the checkpoint folder, for commands that only inspect. Without it, a hub model and hub datasets are downloaded now.

    Raises InputError for a checkpoint that is missing, damaged or not MoE, for a target out of bounds, for a missing text.
    """
    is_run = folder is None
    if folder is None:
        folder = _model_folder(config)
    checkpoint = Checkpoint(folder)
    place = str(checkpoint.folder)
    config = with_counts(config, num_experts_in(checkpoint.config, place))
    family_of(checkpoint.config, place)
    check_config(checkpoint)
    config, fits = with_fits(config, checkpoint)
    targets = targets_of(config.name, variants_of(config))
    identities: dict[str, Identity] = {}
    if (task_files := task_folder(config)) is not None:
        tasks = [args.task for args in task_args(config)]
        identities["tasks"] = tasks_identity(task_files, tasks, "evaluation.harness.include_path")
    for spec in stage_specs():
        spec.check(config, targets, checkpoint)
    identities["model"] = model_identity(checkpoint)
    datasets: dict[str, Dataset] = {}
    for place, text in texts_of(config).items():
        if is_dataset_name(text.data):
            datasets[place] = _dataset(config, text, is_run)
            identities[place] = {text.data[0]: datasets[place].identity}
        else:
            identities[place] = files_identity(text.data, place)
    inputs = Inputs(absolute(checkpoint.folder), identities, expert_sizes(checkpoint.config, str(checkpoint.folder)))
    return Checked(config, inputs, datasets, tuple(map(str, fits)))


def _dataset(config: RunConfig, text: Text, is_run: bool) -> Dataset:
    run_dir = absolute(config.run_dir)
    if config.cache_dir is None and is_remote(run_dir):
        raise InputError(
            f"cache_dir is missing: {text.data[0]} is downloaded to files, and run_dir {run_dir} is object storage; give a "
            f"folder that every node reaches, or download the dataset and give its files"
        )
    dataset = choose_files(text.data[0], text.revision, text.seed, hub_dir(config), text.place)
    if is_run and not dataset.note:
        fetch_files(dataset, text.revision, hub_dir(config), text.place)
    return dataset


def _model_folder(config: RunConfig) -> Path:
    """The checkpoint folder. A hub model is downloaded first. Raises InputError when a store does not answer."""
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
