"""A Hugging Face checkpoint folder, read from its configuration and safetensors headers alone."""

from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from stages.common.errors import InputError
from stages.common.headers import SafetensorsHeader, TensorEntry, read_header
from stages.common.quantised import unpacked_entries
from stages.common.storage import as_path, is_remote, local_copies
from stages.common.untrusted import read_json

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class Checkpoint:
    """A checkpoint folder. Nothing is read before it is asked for; everything that is read is checked.

    Raises InputError from any property when the folder, its config, its index or one of its headers is not usable.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = as_path(folder)
        if not self.folder.is_dir():
            raise InputError(f"model: {self.folder} is not a folder; give a checkpoint folder with {CONFIG_FILE}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The raw `config.json`."""
        value = read_json(self.folder / CONFIG_FILE)
        if not isinstance(value, dict) or not isinstance(value.get("model_type"), str):
            raise InputError(f"{self.folder / CONFIG_FILE} has no model_type; it does not describe a transformers model")
        return value

    @cached_property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files, in the order of their names."""
        return tuple(sorted(set(self._weight_map.values()))) if self._weight_map else (SINGLE_FILE,)

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        path = self.folder / INDEX_FILE
        if not path.exists():
            if not (self.folder / SINGLE_FILE).exists():
                self._refuse_without_safetensors()
            return {}
        index = read_json(path)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{path} has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or PurePosixPath(file).name != file or "\\" in file or file in ("", ".", ".."):
                raise InputError(f"{path}: tensor {name} is said to lie in {file!r}; only files in the folder itself are read")
            if not file.endswith(".safetensors"):
                raise InputError(f"{path}: tensor {name} lies in {file!r}, which is not a safetensors file")
        return weight_map

    def _refuse_without_safetensors(self) -> None:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise InputError(
                f"{self.folder} holds its weights as pickle files ({pickles[0]}, ...), which can run code when read; convert "
                f"them to safetensors first (load with transformers and call save_pretrained)"
            )
        raise InputError(f"{self.folder} has neither {INDEX_FILE} nor {SINGLE_FILE}")

    @cached_property
    def headers(self) -> dict[str, SafetensorsHeader]:
        """Header of each weight file."""
        headers = {file: read_header(self.folder / file) for file in self.files}
        found = {entry.name: file for file, header in headers.items() for entry in header.entries}
        total = sum(len(header.entries) for header in headers.values())
        if not total:
            raise InputError(f"{self.folder} holds no tensor: {', '.join(self.files)} describes none; download it again")
        if total != len(found):
            raise InputError(f"{self.folder}: the same tensor name stands in several weight files")
        for name, file in self._weight_map.items():
            if found.get(name) != file:
                raise InputError(f"{self.folder / INDEX_FILE} puts tensor {name} in {file}, which does not hold it")
        return headers

    @cached_property
    def raw_tensors(self) -> dict[str, TensorEntry]:
        """Every tensor as it lies on disk, files in order of their names, tensors in order of their bytes."""
        return {entry.name: entry for file in self.files for entry in self.headers[file].entries}

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor as the model knows it: a quantised one and its scales are one entry, with the shape of its values."""
        return unpacked_entries(self.raw_tensors, self.config, str(self.folder))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(entry.num_bytes for entry in self.raw_tensors.values())

    @cached_property
    def local_folder(self) -> Path:
        """A local folder with config and side files, for libraries that read no other: the folder itself, or copies."""
        if not is_remote(self.folder):
            return self.folder
        return local_copies([self.folder / CONFIG_FILE, *self.side_files()], self)

    def side_files(self) -> list[Path]:
        """Every other regular file at the top of the folder: tokenizer, templates, generation config, licence."""
        skipped = {CONFIG_FILE, INDEX_FILE, *self.files}
        weights = (*PICKLE_SUFFIXES, ".safetensors", ".index.json", ".h5", ".msgpack", ".onnx", ".gguf")
        return sorted(
            path for path in self.folder.iterdir()
            if path.is_file() and path.name not in skipped and not path.name.startswith(".") and not path.name.endswith(weights)
        )  # fmt: skip
