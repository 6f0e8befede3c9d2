"""Models of the hub: resolves a name to a commit and downloads its files. Only the driver calls this, once per cluster."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, ModelInfo, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    SafetensorsParsingError,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]  # httpx's, by whatever name
from huggingface_hub.utils import SafetensorsFileMetadata, disable_progress_bars  # type: ignore[attr-defined]

from stages.checkpoint.folder import INDEX_FILE, PICKLE_SUFFIXES, SINGLE_FILE, Checkpoint
from stages.checkpoint.headers import write_header
from stages.checkpoint.side_files import is_kept
from stages.contracts.errors import InputError
from stages.contracts.naming import is_hub_name
from stages.io.files import DigestingFile
from stages.io.storage import as_path, is_url
from stages.io.untrusted import read_json
from stages.model.families import family_of, num_experts_in

_SMALL = ("*.json", "*.jinja", "*.model", "*.py", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*", "README.md")
_NOT_NEEDED = ("*/*", "*.index.json")  # files in subfolders are other formats; the index of the weights is fetched by name


def model_folder(model: str) -> Path:
    """The folder that a model names, local or on object storage. Whether the folder exists is checked when it is read.

    Raises InputError for the home (`~name`) of an unknown user.
    """
    if is_url(model):
        return as_path(model)
    try:
        return Path(model).expanduser()
    except RuntimeError as e:
        raise InputError(
            f"model: {model} names no folder: {e}; write org/name for a model of the hub, or a folder that exists"
        ) from e


def resolve_model(model: str, revision: str | None, cache_dir: Path) -> Path:
    """The folder of a model: a given folder itself, or a snapshot of a hub model in cache_dir (storage that every node
    reaches).

    Only the files that a run needs are downloaded: first config, tokenizer and texts; then, if the family is supported, the
    weights that the index names. huggingface_hub finds the token. Raises InputError for a model that does not exist, may not be
    read, cannot be reached, has only pickled weights or is not supported.
    """
    if not is_hub_name(model):
        return model_folder(model)
    place = f"{model}{f' (revision {revision})' if revision else ''}"
    disable_progress_bars()
    try:
        return _download(model, revision, cache_dir, place)
    except (HfHubHTTPError, HFValidationError) as e:
        raise InputError(
            f"model: {place} cannot be read from the hub: {_one_line(e)}; check the name, log in with `hf auth login` or "
            f"HF_TOKEN, or give a checkpoint folder"
        ) from e
    except (TransportError, OfflineModeIsEnabled, LocalEntryNotFoundError) as e:  # the hub did not answer
        return _cached(model, revision, cache_dir, place, e)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def headers_of(model: str, revision: str | None) -> Iterator[Path]:
    """The folder of a model, to inspect: a given folder itself, or a temporary one with the headers of a hub model."""
    if not is_hub_name(model):
        yield model_folder(model)
        return
    with TemporaryDirectory(prefix="hcsmoe-headers-") as folder:
        yield fetch_headers(model, revision, Path(folder))


def fetch_headers(model: str, revision: str | None, folder: Path) -> Path:
    """A folder with the config, tokenizer and headers of a hub model. Its weight files have the right size but are sparse: they
    take no disk space.

    Raises InputError as `resolve_model` does.
    """
    place = f"{model}{f' (revision {revision})' if revision else ''}"
    disable_progress_bars()
    try:
        api = HfApi()
        info = api.model_info(model, revision=revision)
        present = _files(info, place)
        small = [*_SMALL, INDEX_FILE]
        snapshot = Path(
            snapshot_download(model, revision=info.sha, local_dir=folder, allow_patterns=small, ignore_patterns="*/*")
        )
        for file in _weight_files(snapshot, place, present):
            header = api.parse_safetensors_file_metadata(model, file, revision=info.sha)
            _write_hole(snapshot / file, header)
        return snapshot
    except (HfHubHTTPError, HFValidationError, SafetensorsParsingError) as e:
        raise InputError(
            f"model: {place} cannot be read from the hub: {_one_line(e)}; check the name and the revision, and "
            f"log in with `hf auth login` or HF_TOKEN where the model is gated"
        ) from e
    except (TransportError, OfflineModeIsEnabled, LocalEntryNotFoundError) as e:
        raise InputError(
            f"model: {place} is not a folder and the hub cannot be reached: {_one_line(e)}; give a checkpoint "
            f"folder, or try again when it can be reached"
        ) from e


def _write_hole(path: Path, header: SafetensorsFileMetadata) -> None:
    tensors = [
        (name, tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0])
        for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
    ]
    with open(path, "wb") as raw:
        write_header(DigestingFile(raw), tensors, header.metadata or {})
        raw.truncate(raw.tell() + sum(num_bytes for *_, num_bytes in tensors))


def _files(info: ModelInfo, place: str) -> set[str]:
    """File names of a commit. Raises InputError when no safetensors file that this program reads is among them."""
    present = {sibling.rfilename for sibling in info.siblings or ()}
    if not present & {INDEX_FILE, SINGLE_FILE}:
        pickles = sorted(name for name in present if name.endswith(PICKLE_SUFFIXES))
        found = f"only pickle files ({pickles[0]}, ...), which can run code when read" if pickles else f"no {SINGLE_FILE}"
        raise InputError(f"model: {place} has {found}; choose a revision with safetensors files, or convert it first")
    return present


def _fetch(
    model: str,
    revision: str | None,
    cache_dir: Path,
    allow: Sequence[str],
    ignore: Sequence[str] = (),
    is_offline: bool = False,
) -> Path:
    return Path(
        snapshot_download(
            model,
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(allow),
            ignore_patterns=list(ignore) or None,
            local_files_only=is_offline,
        )
    )


def _download(model: str, revision: str | None, cache_dir: Path, place: str) -> Path:
    folder = _fetch(model, revision, cache_dir, _SMALL, _NOT_NEEDED)  # by name: the cache records its commit
    commit = folder.name
    present = _files(HfApi().model_info(model, revision=commit), place)
    rest = sorted(name for name in present if is_kept(name) and not (folder / name).exists())
    if rest:
        _fetch(model, commit, cache_dir, rest)
    if INDEX_FILE in present:
        _fetch(model, commit, cache_dir, [INDEX_FILE])
    config = Checkpoint(folder).config
    family_of(config, place)
    num_experts_in(config, place)
    files = _weight_files(folder, place, present)
    missing = sorted(set(files) - present)
    if missing:
        raise InputError(
            f"model: {place}: {INDEX_FILE} names {', '.join(missing)}, which the hub does not have; choose "
            f"another revision, or report it to the model's owner"
        )
    _fetch(model, commit, cache_dir, files)
    return folder


def _weight_files(folder: Path, place: str, present: Collection[str]) -> list[str]:
    """Names of the weight files. present: names of all files.
    As in transformers, a single file takes precedence over an index."""
    if SINGLE_FILE in present or INDEX_FILE not in present:
        return [SINGLE_FILE]
    index = read_json(folder / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    files = sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not files or any("/" in file or "\\" in file or not file.endswith(".safetensors") for file in files):
        raise InputError(
            f"model: {place}: {INDEX_FILE} names {files}; only safetensors files beside it are read; choose a "
            f"revision with safetensors files alone"
        )
    return files


def _cached(model: str, revision: str | None, cache_dir: Path, place: str, reason: Exception) -> Path:
    """The snapshot that an earlier run has downloaded, for the case that the hub cannot be reached."""
    try:
        folder = _fetch(model, revision, cache_dir, _SMALL, _NOT_NEEDED, is_offline=True)
        present = {path.name for path in folder.iterdir()}
        _fetch(model, folder.name, cache_dir, _weight_files(folder, place, present), is_offline=True)
    except LocalEntryNotFoundError:
        raise InputError(
            f"model: {place} is not a folder, is not complete in {cache_dir}, and the hub cannot be reached: "
            f"{_one_line(reason)}; give a checkpoint folder, or try again when it can be reached"
        ) from reason
    return folder
