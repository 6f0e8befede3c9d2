"""A case: one change to a run that works, a command, and what a person at the command line must then see."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.hostile.contents import Content, Loader, array
from tests.runs import read_tensors, rewrite, write_run_file

HERE = Path(__file__).parent
DEFAULTS: dict[str, dict[str, Any]] = {
    "config": {"began": True},
    "texts": {"state": "prepared"},
    "rundir": {"state": "finished"},
}
"""By file, what its cases have if they do not say otherwise. Cases on texts then need not survey the checkpoint again."""
INDEX = "model/model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """One case. Paths are relative to its folder, which holds `model/`, `ids.npy`, `run.yaml` and, once it ran, `run/`.

    The change, in this order:
        base: the checkpoint: mixtral, qwen2_moe or deepseek_v3.
        state: of its run: new, prepared (prepare is done) or finished. A finished run's checkpoint stays elsewhere.
        remove: files.
        config: keys of `config.json`, dotted. without: keys of it that are removed.
        tensors: by name, what replaces a tensor: null removes it, {at: [...], value: x} changes an element, else an array.
        index: by tensor, the file that the index names.
        header: by tensor, fields of its header; shift moves the offsets.
        files: by path (or pattern of what is there, below `model/` or `run/`), the content.
    The command:
        command: its arguments; `FOLDER` is the case's folder. set: settings by dotted name, given with --set.
    What is expected:
        says: parts of the error, with exit code 2.
        began: whether prepare may have begun before it, and told of its progress. late: calibrate too.
        prints: parts of what is printed, with exit code 0.
        keeps: files that must be there with this text. absent: patterns of files that must not be.
    """

    name: str
    base: str = "mixtral"
    state: str = "new"
    remove: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    header: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=lambda: ["run", "FOLDER/run.yaml", "--executor", "local"])
    set: dict[str, Any] = field(default_factory=dict)
    says: list[str] | None = None
    began: bool = False
    late: bool = False
    prints: list[str] | None = None
    keeps: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def arguments(self, folder: Path) -> list[str]:
        """The command line."""
        settings = (f"{name}={value if isinstance(value, str) else _flow(value)}" for name, value in self.set.items())
        options = [part for setting in settings for part in ("--set", setting)]
        return [argument.replace("FOLDER", str(folder)) for argument in (*self.command, *options)]

    def make(self, folder: Path, source: Path) -> None:
        """Make the case's folder from the base's."""
        shutil.copytree(source, folder, symlinks=True)
        model = (source if self.state == "finished" else folder) / "model"
        write_run_file(folder, model, folder / "ids.npy", {})
        for path in self.remove:
            for found in _found(folder, path):
                found.unlink()
        if self.config or self.without:
            self._edit_config(folder / "model" / "config.json")
        if self.tensors:
            self._edit_tensors(folder / "model")
        if self.index:
            self._edit_index(folder / INDEX)
        for name, fields in self.header.items():
            _edit_header(folder, name, fields)
        for path, content in self.files.items():
            for found in _found(folder, path):
                found.parent.mkdir(parents=True, exist_ok=True)
                made = content if isinstance(content, Content) else Content("text", content)
                if made.kind != "cut":
                    _remove(found)
                made.put(found, folder)

    def _edit_config(self, path: Path) -> None:
        fields = json.loads(path.read_text())
        for name, value in self.config.items():
            *parents, last = name.split(".")
            part = fields
            for parent in parents:
                part = part.setdefault(parent, {})
            part[last] = value
        for name in self.without:
            del fields[name]
        path.write_text(json.dumps(fields))

    def _edit_tensors(self, model: Path) -> None:
        tensors = read_tensors(model)
        for name, change in self.tensors.items():
            if change is None:
                del tensors[name]
            elif "at" in change:
                tensors[name][tuple(change["at"])] = change["value"]
            elif change.get("dtype") in ("float16", "bfloat16") and "shape" not in change:
                tensors[name] = tensors[name].to(getattr(torch, change["dtype"]))
            else:
                tensors[name] = torch.from_numpy(array({"dtype": "float32", **change}))
        rewrite(model, tensors)

    def _edit_index(self, path: Path) -> None:
        index = json.loads(path.read_text())
        index["weight_map"] |= self.index
        path.write_text(json.dumps(index))


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _found(folder: Path, path: str) -> list[Path]:
    """The paths that a pattern below `model/` or `run/` means; it must match, or the case would test nothing."""
    if "*" not in path or not path.startswith(("model/", "run/")):
        return [folder / path]
    parent, _, name = path.rpartition("/")
    found = sorted(folder.glob(path)) or [found / name for found in folder.glob(parent) if "*" not in name]
    assert found, f"nothing matches {path}"
    return found


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _edit_header(folder: Path, name: str, fields: dict[str, Any]) -> None:
    """Change what the header of a tensor's file says of it."""
    path = folder / "model" / json.loads((folder / INDEX).read_text())["weight_map"][name]
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    changed = dict(fields)
    if shift := changed.pop("shift", None):
        changed["data_offsets"] = [offset + by for offset, by in zip(header[name]["data_offsets"], shift, strict=True)]
    header[name] |= changed
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def load_cases() -> list[Case]:
    """Every case of the YAML files beside this module, named after its file."""
    cases = []
    for path in sorted(HERE.glob("*.yaml")):
        for fields in yaml.load(path.read_text(), Loader):
            cases.append(Case(**{**DEFAULTS.get(path.stem, {}), **fields, "name": f"{path.stem}: {fields['name']}"}))
    return cases
