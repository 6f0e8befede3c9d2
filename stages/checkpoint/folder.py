"""A Hugging Face checkpoint folder, read from its configuration and safetensors headers alone."""

import json
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from stages.checkpoint.headers import SafetensorsHeader, TensorEntry, read_header
from stages.checkpoint.quantised import unpacked_entries
from stages.checkpoint.side_files import SideFiles, find_side_files
from stages.contracts.errors import InputError
from stages.io.storage import as_path, is_remote, local_copies
from stages.io.untrusted import read_json, shown

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
WEIGHTS_FIELD = "transformers_weights"
"""Config setting that makes transformers load weight files of another name."""
_MAX_CONFIG_BYTES, _MAX_INDEX_BYTES, _MAX_NAME_BYTES = 1 << 24, 1 << 26, 255
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Checkpoint:
    """A checkpoint folder. Files are read on first use, and their content is checked.

    Every property raises InputError when the folder, its config, its index or one of its headers is unusable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_path(folder)
        if not self.folder.is_dir():
            raise InputError(f"model: {self.folder} is not a folder; give a checkpoint folder with {CONFIG_FILE}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The raw `config.json`."""
        value = read_json(self.folder / CONFIG_FILE, _MAX_CONFIG_BYTES)
        if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
            raise InputError(
                f"{self.folder / CONFIG_FILE} has no model_type; it does not describe a transformers model; "
                f"restore the config of the checkpoint"
            )
        return value

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Sorted names of the weight files."""
        return tuple(sorted(set(self._weight_map.values()))) if self._weight_map else (SINGLE_FILE,)

    @cached_property
    def index(self) -> dict[str, Any]:
        """The index of the weight files; empty for a single weight file.

        As in transformers, `model.safetensors` takes precedence over an index beside it.
        """
        named = self.config.get(WEIGHTS_FIELD)
        if named is not None:
            raise InputError(
                f"{self.folder / CONFIG_FILE}: {WEIGHTS_FIELD} is {shown(repr(named))}, but weights are read only from "
                f"{SINGLE_FILE} or {INDEX_FILE}; give them one of these names and remove the setting"
            )
        path = self.folder / INDEX_FILE
        if (self.folder / SINGLE_FILE).exists():
            return {}
        if not path.exists():
            self._refuse_without_safetensors()
        index = read_json(path, _MAX_INDEX_BYTES)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict) or not index["weight_map"]:
            raise InputError(f"{path} has no weight_map; download it again")
        _check_metadata(index.get("metadata"), path)
        return index

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        weight_map: dict[str, str] = self.index.get("weight_map", {})
        path = self.folder / INDEX_FILE
        for name, file in weight_map.items():
            if not _is_file_name(file):
                place = f"{path}: tensor {shown(name)} is said to lie in {shown(repr(file))}"
                raise InputError(
                    f"{place}; only files in the folder itself are read; put the weights there, and name files without folders"
                )
            if not file.endswith(".safetensors"):
                raise InputError(
                    f"{path}: tensor {shown(name)} lies in {shown(repr(file))}, which is not a safetensors "
                    f"file; convert the weights to safetensors"
                )
        return weight_map

    @cached_property
    def ignored_files(self) -> tuple[str, ...]:
        """Files that are not read because `model.safetensors` takes precedence: an index, and the other weight files."""
        if self.index or not (self.folder / INDEX_FILE).exists():
            return ()
        shards = {path.name for path in self.folder.iterdir() if path.name.endswith(".safetensors")} - {SINGLE_FILE}
        return (INDEX_FILE, *sorted(shards))

    def _refuse_without_safetensors(self) -> None:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise InputError(
                f"{self.folder} holds its weights as pickle files ({pickles[0]}, ...), which can run code when read; convert "
                f"them to safetensors first (load with transformers and call save_pretrained)"
            )
        others = sorted(p.name for p in self.folder.iterdir() if p.suffix == ".gguf" or p.name.startswith("adapter_model."))
        found = f" but {others[0]}; give the original checkpoint, not a conversion or an adapter of it" if others else ""
        raise InputError(f"{self.folder} has neither {INDEX_FILE} nor {SINGLE_FILE}{found}")

    @cached_property
    def headers(self) -> dict[str, SafetensorsHeader]:
        """Header of each weight file."""
        headers = {file: read_header(self.folder / file) for file in self.files}
        found = {entry.name: file for file, header in headers.items() for entry in header.entries}
        total = sum(len(header.entries) for header in headers.values())
        if not total:
            raise InputError(f"{self.folder} holds no tensor: {', '.join(self.files)} describes none; download it again")
        if total != len(found):
            raise InputError(
                f"{self.folder}: the same tensor name stands in several weight files; remove the files that "
                f"are left from another version"
            )
        for name, file in self._weight_map.items():
            if found.get(name) != file:
                raise InputError(
                    f"{self.folder / INDEX_FILE} puts tensor {shown(name)} in {shown(file)}, which does not hold it; "
                    f"download both again"
                )
        return headers

    @cached_property
    def raw_tensors(self) -> dict[str, TensorEntry]:
        """Every tensor as stored on disk: files in order of their names, tensors in order of their bytes."""
        return {entry.name: entry for file in self.files for entry in self.headers[file].entries}

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor as the model sees it. A quantised tensor and its scales are one entry, with the shape of the values."""
        return unpacked_entries(self.raw_tensors, self.config, str(self.folder))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.num_bytes for entry in self.raw_tensors.values())

    @cached_property
    def local_folder(self) -> Path:
        """A local folder with config and side files, for libraries that read only local files: the folder itself, or copies."""
        if not is_remote(self.folder):
            return self.folder
        return local_copies(self.folder, [CONFIG_FILE, *self.side_files.kept], self)

    @cached_property
    def side_files(self) -> SideFiles:
        """All other files: those that an export includes (tokenizer, templates, generation config, licence), and the rest."""
        return find_side_files(self.folder, self.config, {CONFIG_FILE, INDEX_FILE, *self.files})


def _is_file_name(file: Any) -> bool:
    """Whether a value is a plain file name: it does not lead out of the folder, and the file system accepts it."""
    if not isinstance(file, str) or PurePosixPath(file).name != file or file in ("", ".."):
        return False
    return "\\" not in file and file.isprintable() and len(file.encode()) <= _MAX_NAME_BYTES


def _check_metadata(metadata: Any, path: Path) -> None:
    """Raise InputError if an index's metadata cannot be written into an export."""
    try:
        json.dumps(dict(metadata or {}), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as e:
        raise InputError(
            f"{path}: metadata must be an object of numbers and text that JSON can hold: {shown(str(e))}; remove what is not"
        ) from e
