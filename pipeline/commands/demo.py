"""`demo`: runs the comparison of methods on the example model, wherever this program is installed."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config import apply_setting, config_of
from pipeline.yaml_files import read_yaml
from stages.contracts.errors import InputError
from stages.contracts.settings import RunConfig

EXAMPLE = "compare.yaml"
_FOLDER = "examples"
_INSTALLED = f"share/hcsmoe/{_FOLDER}"
"""Where a wheel puts the examples, below the data folder of the environment (`data-files` of pyproject.toml)."""


def examples_folder() -> Path:
    """The examples: beside the source, or where a wheel was installed. Raises InputError where there are none."""
    beside = Path(__file__).parents[2] / _FOLDER
    if (beside / EXAMPLE).is_file():
        return beside
    try:
        installed = metadata.files("hcsmoe") or []
    except metadata.PackageNotFoundError:
        installed = []
    for file in installed:
        if file.as_posix().endswith(f"{_INSTALLED}/{EXAMPLE}"):
            return Path(str(file.locate())).resolve().parent
    raise InputError(f"{beside} does not exist, and the installed package has no examples; install hcsmoe's wheel, or clone it")


def demo_config(run_dir: str, settings: Sequence[str]) -> RunConfig:
    """The run file of the example, with paths that hold from anywhere. settings: as of `--set`."""
    folder = examples_folder()
    values = _located(read_yaml(folder / EXAMPLE, "run file"), folder.parent)
    values["run_dir"] = run_dir
    for setting in settings:
        apply_setting(values, setting)
    return config_of(values, {}, str(folder / EXAMPLE))


def _located(value: Any, parent: Path) -> Any:
    """The same values with every path below the examples made absolute."""
    if isinstance(value, dict):
        return {name: _located(one, parent) for name, one in value.items()}
    if isinstance(value, list):
        return [_located(one, parent) for one in value]
    return str(parent / value) if isinstance(value, str) and value.startswith(f"{_FOLDER}/") else value
