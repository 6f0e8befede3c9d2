"""The rule of the architecture: `stages` is what is computed, `pipeline` is how it is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.registry import STAGES

REPOSITORY = Path(__file__).parents[1]
SHARED_ROOMS = ("contracts", "io", "checkpoint", "model", "harness", "engines")
NUMERIC = {"torch", "transformers", "numpy", "scipy", "safetensors", "datasets", "tokenizers"}


def _modules(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, also inside functions and by `importlib` under a constant name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; imports here name the whole module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield str(node.args[0].value)


def _name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("path", _modules("stages"), ids=_name)
def test_stages_import_neither_ray_nor_pipeline_nor_each_other(path: Path) -> None:
    stage = path.relative_to(REPOSITORY / "stages").parts[0]
    for name in imported(path):
        top, *rest = name.split(".")
        assert top not in ("ray", "pipeline"), f"{_name(path)} imports {name}"
        if top == "stages" and rest:
            assert rest[0] in (stage, *SHARED_ROOMS), f"{_name(path)} imports {name}: stages meet in files only"


@pytest.mark.parametrize("path", _modules("pipeline"), ids=_name)
def test_pipeline_imports_no_numeric_library(path: Path) -> None:
    for name in imported(path):
        assert name.split(".")[0] not in NUMERIC, f"{_name(path)} imports {name}: it belongs to a stage"


@pytest.mark.parametrize("path", _modules("pipeline"), ids=_name)
def test_pipeline_names_no_stage(path: Path) -> None:
    """It knows stages by their specs alone, which `stages.registry` lists."""
    for name in imported(path):
        top, *rest = name.split(".")
        assert top != "stages" or not rest or rest[0] in (*SHARED_ROOMS, "registry"), f"{_name(path)} imports {name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in STAGES, f"{_name(path)} names the stage {node.value}"
            assert not node.value.startswith(tuple(f"stages.{stage}." for stage in STAGES)), f"{_name(path)}: {node.value}"


@pytest.mark.parametrize("path", [*_modules("stages"), *_modules("pipeline")], ids=_name)
def test_the_harness_is_imported_in_its_own_room_alone(path: Path) -> None:
    """It is an extra: all else works without it. Its room's modules that import it are imported inside functions."""
    tops = {alias for alias in imported(path) if alias.split(".")[0] == "lm_eval"}
    assert not tops or _name(path) in ("stages/harness/tasks.py", "stages/harness/models.py")
    at_top = ast.parse(path.read_text(encoding="utf-8")).body
    names = [node.module for node in at_top if isinstance(node, ast.ImportFrom)]
    assert not {"stages.harness.tasks", "stages.harness.models"} & set(names), f"{_name(path)} needs the extra to be imported"


def test_the_walk_finds_imports_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "import ray.util\ndef f():\n    from torch import nn\n    import importlib\n    importlib.import_module('x.y')\n"
    )
    assert set(imported(path)) == {"ray.util", "torch.nn", "importlib", "x.y"}


def test_both_packages_are_walked() -> None:
    assert len(_modules("stages")) > 20
    assert len(_modules("pipeline")) > 15


PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
LOADERS = {("torch", "load"), ("pd", "read_pickle"), ("pandas", "read_pickle"), ("yaml", "load"), ("yaml", "unsafe_load")}


def _code_runners(tree: ast.AST) -> Iterator[str]:
    """Calls that would run code that a file holds."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = (node.func.value.id, node.func.attr)
            if called in LOADERS:
                yield ".".join(called)
        allowed = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
        if any(not isinstance(value, ast.Constant) or value.value is not False for value in allowed):
            yield "allow_pickle"


@pytest.mark.parametrize("path", [*_modules("stages"), *_modules("pipeline")], ids=_name)
def test_no_pickle_is_read(path: Path) -> None:
    """Whoever may write to a run directory or a checkpoint must not run code through it."""
    assert PICKLES.isdisjoint(name.split(".")[0] for name in imported(path))
    assert list(_code_runners(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_walk_finds_readers_of_pickles() -> None:
    text = "torch.load(p)\nnp.load(p, allow_pickle=x)\nnp.load(p, allow_pickle=False)\nyaml.safe_load(t)\nyaml.load(t)"
    assert sorted(_code_runners(ast.parse(text))) == ["allow_pickle", "torch.load", "yaml.load"]
