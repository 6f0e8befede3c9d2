"""Arguments of the Python API as the values of a run file, so that both are checked by the same code."""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import TypeAlias

from pydantic import JsonValue

from pipeline.config import config_of
from stages.contracts.naming import model_name
from stages.contracts.settings import RunConfig

PathName: TypeAlias = str | PathLike[str]
Text: TypeAlias = PathName | Sequence[PathName] | Mapping[str, PathName | Sequence[PathName] | Mapping[str, JsonValue]]
"""Files, folders or a hub dataset; or several by the name of their domain."""
TargetLike: TypeAlias = int | float | Sequence[int] | Mapping[str, JsonValue]
"""Experts a layer as a number, their share of the source's as a float, one number a layer, or a target as run files have it."""


def asked_config(
    model: PathName,
    target: TargetLike | Sequence[TargetLike],
    method: str | Sequence[str],
    data: Text,
    run_dir: PathName | None,
    evaluation: Text | None,
    formats: str | Sequence[str] | None,
    settings: Mapping[str, JsonValue],
) -> RunConfig:
    """The run that the arguments of `hcsmoe.compress` ask for. Raises InputError as `pipeline.config.config_of` does."""
    values: dict[str, JsonValue] = {
        "model": fspath(model),
        "run_dir": fspath(run_dir) if run_dir is not None else f"runs/{model_name(fspath(model))}",
        "calibration": {"data": _text(data)},
        "clustering": {"targets": _targets(target)},
        "variants": [method] if isinstance(method, str) else list(method),
    }
    if evaluation is not None:
        values["evaluation"] = {"data": _text(evaluation)}
    if formats is not None:
        values["export"] = {"formats": formats if isinstance(formats, str) else list(formats)}
    return config_of(values, settings, "arguments")


def _targets(target: TargetLike | Sequence[TargetLike]) -> list[JsonValue]:
    """Targets as run files have them. A list holds several targets; a tuple of numbers is one, with a number for each layer."""
    return [_target(one) for one in target] if isinstance(target, list) else [_target(target)]


def _target(target: TargetLike | Sequence[TargetLike]) -> JsonValue:
    if isinstance(target, float):
        return {"share": target}
    if isinstance(target, Mapping):
        return dict(target)
    return list(target) if isinstance(target, tuple) else target  # type: ignore[return-value]  # checked with the run file


def _text(text: Text) -> JsonValue:
    """A text as run files have it, with paths as strings."""
    if isinstance(text, Mapping):
        return {name: dict(one) if isinstance(one, Mapping) else _text(one) for name, one in text.items()}
    return fspath(text) if isinstance(text, str | PathLike) else [fspath(one) for one in text]
