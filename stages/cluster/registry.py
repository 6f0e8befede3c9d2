"""Which methods there are. Adding one adds a file in `methods` and one line here."""

import importlib
from functools import cache
from typing import Any

from stages.contracts.method import Method, Methods

MODULES = (
    "stages.cluster.methods.hierarchical",
    "stages.cluster.methods.kmeans",
    "stages.cluster.methods.dominant",
    "stages.cluster.methods.ream",
    "stages.cluster.methods.pairs",
    "stages.cluster.methods.slim",
    "stages.cluster.methods.best",
    "stages.cluster.methods.random",
    "stages.cluster.methods.f_prune",
    "stages.cluster.methods.s_prune",
    "stages.cluster.methods.reap",
    "stages.cluster.methods.adopt",
    "stages.cluster.methods.ean",
    "stages.cluster.methods.o_prune",
    "stages.cluster.methods.random_prune",
)
"""Each holds a METHOD."""

_added: list[str] = []


def method_at(module: str) -> Method[Any]:
    """The METHOD of a module. A unit is told the module's name, so that every worker finds a method of one's own."""
    method = importlib.import_module(module).METHOD
    assert isinstance(method, Method), f"{module}.METHOD is no method"
    return method


def modules() -> dict[str, str]:
    """Names of the modules that hold a method, by name of the method."""
    return _by_name((*MODULES, *_added))


@cache
def _by_name(places: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for module in places:
        name = method_at(module).name
        assert name not in found, f"{module} and {found[name]} hold a method named {name}"
        found[name] = module
    return found


def methods() -> Methods:
    """All methods, by name."""
    return {name: method_at(module) for name, module in modules().items()}


def register(module: str) -> None:
    """Make a method of one's own known. module: importable on every worker."""
    if module not in (*MODULES, *_added):
        method_at(module)
        _added.append(module)


def forget(module: str) -> None:
    """Undo `register`."""
    _added.remove(module)
