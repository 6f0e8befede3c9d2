"""Finds the files of a dataset split by the rules of `datasets`, from file names and README alone."""

import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import datasets

from stages.contracts.errors import InputError


def split_files(place: str, names: Sequence[str], readme: bytes | None, split: str) -> list[str]:
    """Sorted names of the files of a split. names: all files of the dataset. readme: content of README.md, which may define
    splits.

    Raises InputError when the split does not exist, or exists only in named configurations, among which no setting can choose.
    """
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="hcsmoe-names-") as temporary:
        folder = Path(temporary).resolve()  # `datasets` looks only at names, so empty files suffice
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise InputError(
                    f"{place}: it has a file named {name!r}, which leads out of its folder; give its files instead"
                )
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        if readme is not None:
            (folder / "README.md").write_bytes(readme)
        try:
            builder = datasets.load_dataset_builder(str(folder), cache_dir=str(folder / ".cache"))
        except (datasets.exceptions.DatasetsError, ValueError, OSError, TypeError, AttributeError, RuntimeError) as e:
            reason = " ".join(str(e).split()).replace(str(folder), place)
            raise InputError(f"{place}: no data files are found: {reason}; download them and give the files") from e
        found = builder.config.data_files or {}
        if split not in found:
            raise InputError(f"{place} has no split {split!r}; it has {', '.join(map(str, found)) or 'none'}")
        return sorted(Path(file).relative_to(folder).as_posix() for file in found[split])
