"""Which files of a dataset of the hub make a split: by the rules of `datasets`, from names and README alone."""

import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import datasets

from stages.contracts.errors import InputError


def split_files(place: str, names: Sequence[str], readme: bytes | None, split: str) -> list[str]:
    """Names of the files of a split, sorted. names: of all files of the dataset; readme: its README.md, which may list splits.

    Raises InputError when there is no such split, or none without a choice that we have no setting for.
    """
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="hcsmoe-names-") as temporary:
        folder = Path(temporary).resolve()  # `datasets` looks at names only: empty files are enough
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise InputError(f"{place}: it has a file named {name!r}, which leads out of its folder")
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
