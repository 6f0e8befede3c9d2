"""The stages, in the order in which their parts and units are listed. To add a stage, add its name here."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # not imported at run time, since the command line must start fast
    from stages.contracts.spec import StageSpec

STAGES = ("prepare", "requests", "calibrate", "cluster", "recombine", "mtp", "merge", "assemble", "evaluate", "report")
"""Folders of `stages/` whose `spec.py` declares a stage as SPEC. Only names, so that the command line can list stages fast."""

RECOMMENDED = "best"
"""Preset that is suggested to people who have not chosen one."""

_added: "list[StageSpec]" = []


@cache
def _spec(name: str) -> "StageSpec":
    spec: StageSpec = importlib.import_module(f"stages.{name}.spec").SPEC
    assert spec.name == name, f"stages/{name}/spec.py declares {spec.name}"
    return spec


def stage_specs() -> "tuple[StageSpec, ...]":
    """All stages."""
    return (*map(_spec, STAGES), *_added)


def stage_names() -> tuple[str, ...]:
    """Names of all stages."""
    return (*STAGES, *(spec.name for spec in _added))


@contextmanager
def added_stage(spec: "StageSpec") -> Iterator[None]:
    """Append a stage of the caller's own after all others while the context lasts."""
    _added.append(spec)
    try:
        yield
    finally:
        _added.remove(spec)
