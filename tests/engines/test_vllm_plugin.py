"""What of vLLM's plug-in can be seen without vLLM: it is found, and names the classes that exports name."""

import sys
import tomllib
from importlib import import_module
from types import ModuleType

import pytest
import transformers

from stages.engines.vllm_plugin import TIED_CLASSES
from stages.model.tied import class_name
from tests.conftest import REPOSITORY


def test_vllm_is_told_the_classes_that_tied_exports_name(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    fake = ModuleType("vllm")
    fake.ModelRegistry = type("ModelRegistry", (), {"register_model": told.__setitem__})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    entry_points = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = entry_points["hcsmoe"].partition(":")
    getattr(import_module(module), function)()
    bases = [base.rpartition(":")[2] for base in TIED_CLASSES.values()]
    assert told == {class_name(base): f"stages.engines.vllm_models:{class_name(base)}" for base in bases}
    assert all(issubclass(getattr(transformers, base), transformers.PreTrainedModel) for base in bases)
