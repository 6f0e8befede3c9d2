"""Datasets of the hub: resolves a name to a commit, chooses files of it, and downloads them.

Only the driver calls this, once per cluster; workers read the downloaded files.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # httpx's, by whatever name
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
from rich import filesize

from pipeline.imports import resolve
from stages.contracts.errors import InputError
from stages.io.files import write_json
from stages.io.texts import KNOWN, kind_of
from stages.io.untrusted import read_json, read_small

ENOUGH_BYTES = 1 << 30
"""Files are taken in an order given by the seed until they have this many bytes. A smaller dataset is taken whole."""
_README = "README.md"
_AWAY = (TransportError, OfflineModeIsEnabled, LocalEntryNotFoundError)


@dataclass(frozen=True)
class Dataset:
    """The files of a dataset that a run reads.

    sizes: bytes of each file that is read, by name. listing: bytes of every file of the commit. num_files: files of the split.
    note: message for the user.
    """

    repo: str
    commit: str
    sizes: Mapping[str, int]
    listing: Mapping[str, int]
    num_files: int
    note: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """The facts that determine the text: commit and file names."""
        return {"commit": self.commit, "files": sorted(self.sizes)}

    def __str__(self) -> str:
        num_bytes = filesize.decimal(sum(self.sizes.values()))
        return f"{self.repo} at commit {self.commit}: {len(self.sizes)} of {self.num_files} files, {num_bytes}"


def is_dataset_name(data: Sequence[str]) -> bool:
    """Whether a text names a hub dataset, `org/name[:split]`, and not files."""
    return (
        len(data) == 1
        and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", data[0]) is not None
        and kind_of(data[0]) is None
        and not Path(data[0]).is_symlink()
        and not Path(data[0]).exists()
    )


def is_identity(value: Mapping[str, Any]) -> bool:
    """Whether a recorded value is a valid identity of a text: digests of files, or commit and files of a hub dataset."""
    for part in value.values():
        if isinstance(part, dict):
            commit, files = part.get("commit"), part.get("files")
            if not isinstance(commit, str) or not isinstance(files, list) or not all(isinstance(file, str) for file in files):
                return False
        elif not isinstance(part, str):
            return False
    return bool(value)


def dataset_paths(cache_dir: Path, repo: str, identity: Mapping[str, Any]) -> list[Path]:
    """Paths to which `fetch_files` downloads the files of an identity."""
    snapshot = cache_dir / repo_folder_name(repo_id=repo, repo_type="dataset") / "snapshots" / identity["commit"]
    return [snapshot / file for file in identity["files"]]


def choose_files(name: str, revision: str | None, seed: int, cache_dir: Path, place: str) -> Dataset:
    """Ask the hub for the commit of a dataset and choose the files to read. Leaves nothing on disk.

    When the hub does not answer, files are chosen from those that an earlier run has downloaded to cache_dir, and `note` says
    so. Raises InputError for a dataset or a split that does not exist, may not be read, cannot be reached or has files of
    another kind.
    """
    repo, _, split = name.partition(":")
    where = f"{place}.data: {repo}{f' (revision {revision})' if revision else ''}"
    disable_progress_bars()
    try:
        with _answered(where), TemporaryDirectory(prefix="hcsmoe-readme-") as folder:
            info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
            assert info.sha is not None
            sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
            if _README in sizes:
                hf_hub_download(repo, _README, repo_type="dataset", revision=info.sha, local_dir=folder)
            return _chosen(repo, split, info.sha, sizes, Path(folder), seed, where)
    except _AWAY as e:
        return _chosen_offline(repo, split, revision, seed, cache_dir, where, e)


def fetch_files(dataset: Dataset, revision: str | None, cache_dir: Path, place: str) -> None:
    """Download the chosen files to cache_dir, on storage that every node reaches.
    Raises InputError when the hub does not send one."""
    disable_progress_bars()
    where = f"{place}.data: {dataset.repo}"
    try:
        with _answered(where):
            # first by name, so that the cache records the commit for runs without the hub
            hf_hub_download(
                dataset.repo, next(iter(dataset.sizes)), repo_type="dataset", revision=revision, cache_dir=cache_dir
            )
            for file in (*dataset.sizes, *({_README} & dataset.listing.keys())):
                hf_hub_download(dataset.repo, file, repo_type="dataset", revision=dataset.commit, cache_dir=cache_dir)
        write_json(_listing_file(cache_dir, dataset.repo, dataset.commit), dict(dataset.listing))
    except _AWAY as e:
        raise InputError(
            f"{where} is not complete in {cache_dir}, and the hub cannot be reached: {_one_line(e)}; try again "
            f"when it can be reached"
        ) from e


@contextmanager
def _answered(where: str) -> Iterator[None]:
    """Raise errors that the hub answers as InputError. Errors of a hub that does not answer (_AWAY) pass on to the caller."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError) as e:
        raise InputError(
            f"{where} is no file, and cannot be read from the hub: {_one_line(e)}; check the name, log in with `hf auth login` "
            f"or HF_TOKEN, or give files"
        ) from e


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _chosen(
    repo: str, split: str, commit: str, sizes: Mapping[str, int], folder: Path, seed: int, where: str, note: str = ""
) -> Dataset:
    """Choose files of a split. folder: contains README.md, if the dataset has one."""
    readme = read_small(folder / _README) if _README in sizes else None
    found = resolve("stages.io.splits:split_files")(where, sorted(sizes), readme, split or "train")
    names = cast(list[str], found)
    for name in names:
        if kind_of(name) in (None, "ids"):
            raise InputError(f"{where}: its file {name} is of a kind that is not read; known: {KNOWN}")
    chosen: dict[str, int] = {}
    for name in sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if sum(chosen.values()) < ENOUGH_BYTES:
            chosen[name] = sizes[name]
    return Dataset(repo, commit, dict(sorted(chosen.items())), sizes, len(names), note)


def _chosen_offline(
    repo: str, split: str, revision: str | None, seed: int, cache_dir: Path, where: str, reason: Exception
) -> Dataset:
    """Choose from the files that an earlier run has downloaded."""
    try:
        snapshot = Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=_README
            )
        )
    except LocalEntryNotFoundError:
        raise InputError(
            f"{where} is no file, is not in {cache_dir}, and the hub cannot be reached: {_one_line(reason)}; give files, or "
            f"try again when it can be reached"
        ) from reason
    listing = _listing_file(cache_dir, repo, snapshot.name)
    if not listing.exists():
        raise InputError(
            f"{where} was not downloaded to {cache_dir} by a run, and the hub cannot be reached: {_one_line(reason)}; give "
            f"files, or try again when it can be reached"
        ) from reason
    note = f"{where}: the hub cannot be reached; files of commit {snapshot.name} in {cache_dir} are used"
    dataset = _chosen(repo, split, snapshot.name, read_json(listing), snapshot, seed, where, note)
    missing = [name for name in dataset.sizes if not (snapshot / name).exists()]
    if missing:
        raise InputError(
            f"{where}: {', '.join(missing)} is not in {cache_dir}, and the hub cannot be reached: {_one_line(reason)}; give "
            f"files, or try again when it can be reached"
        ) from reason
    return dataset


def _listing_file(cache_dir: Path, repo: str, commit: str) -> Path:
    """File with names and sizes of all files of a commit. Without it, nobody could tell offline which files make up a split."""
    return cache_dir / repo_folder_name(repo_id=repo, repo_type="dataset") / f"files-{commit}.json"
