"""Reads run files: YAML, `--set`, and one error line for every mistake."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import JsonValue, ValidationError, create_model

from pipeline.display.problems import problems
from pipeline.run.variants import method_of, variants_of
from pipeline.yaml_files import parse_yaml, read_yaml
from stages.contracts.errors import InputError
from stages.contracts.section import Section
from stages.contracts.settings import Clustering, RunConfig
from stages.registry import stage_specs

_MAX_DEPTH = 8


def apply_setting(values: dict[str, JsonValue], setting: str) -> None:
    """Apply one `--set KEY=VALUE` in place. KEY is dotted, VALUE is YAML. Raises InputError for any other form."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise InputError(f"--set {setting}: write KEY=VALUE, for example --set clustering.linkage=single")
    set_value(values, key, parse_yaml(text, f"the value of --set {setting}"), f"--set {setting}")


def set_value(values: dict[str, JsonValue], key: str, value: JsonValue, place: str) -> None:
    """Set the value at a dotted key. Raises InputError that names `place` for a malformed key, or one that leads through a
    value."""
    *parents, last = key.split(".")
    if not all((*parents, last)) or len(parents) > _MAX_DEPTH:
        raise InputError(f"{place}: {key} is no setting; write names with a dot between them, such as clustering.linkage")
    section = values
    for name in parents:
        nested = section.setdefault(name, {})
        if not isinstance(nested, dict):
            raise InputError(f"{place}: {name} is not a section; write the names that lead to the setting")
        section = nested
    section[last] = value


def read_config(values: Mapping[str, Any]) -> RunConfig:
    """Parse and check the values of a run file, with the sections that its stages and its method declare.

    Raises InputError for an unknown method, and pydantic.ValidationError for any other mistake.
    """
    further = tuple((name, kind) for spec in stage_specs() for name, kind in spec.sections.items())
    clustering: type[Clustering] = method_of(values.get("clustering"), "clustering").settings
    return _class_with(clustering, further).model_validate(values)


@cache
def _class_with(clustering: type[Clustering], further: tuple[tuple[str, type[Section]], ...]) -> type[RunConfig]:
    """Run file class with the section of a method and the sections of stages.
    Equal sections give the same class, so that configs compare equal."""
    sections: dict[str, Any] = {name: (kind, kind()) for name, kind in further}
    return create_model("RunConfig", __base__=RunConfig, **sections, clustering=(clustering, ...))


def load_config(
    path: Path, settings: Sequence[str], values_on_top: Mapping[str, JsonValue] = MappingProxyType({})
) -> RunConfig:
    """Read a run file, then apply `--set` settings, then override values by their dotted keys.

    Raises InputError that names the file, the key and the allowed values.
    """
    values = read_yaml(path, "run file")
    if not isinstance(values, dict):
        raise InputError(f"run file {path} must hold keys and values; see examples/tiny-mixtral.yaml")
    for setting in settings:
        apply_setting(values, setting)
    return config_of(values, values_on_top, str(path))


def config_of(values: dict[str, JsonValue], values_on_top: Mapping[str, JsonValue], place: str) -> RunConfig:
    """Check the values of a run file, with further values by their dotted keys. place: where they come from, for messages.

    Raises InputError that names the place, the key and the allowed values.
    """
    for key, value in values_on_top.items():
        set_value(values, key, value, f"set of {place}")
    try:
        config = read_config(values)
        _check_variant_sections(values)
        variants_of(config)
    except ValidationError as e:
        raise InputError(f"{place}: {problems(e)}") from e
    except InputError as e:
        raise InputError(f"{place}: {e}") from e
    return config


def _check_variant_sections(values: Mapping[str, Any]) -> None:
    """Raise InputError when a run file with variants also sets method sections: each variant has its own."""
    if values.get("variants") is None:
        return
    beside = [f"clustering.{name}" for name in values["clustering"] if name not in ("num_experts", "targets")]
    beside += [name for name in ("budget", "merging", "refit") if name in values]
    if beside:
        raise InputError(f"{beside[0]} is set beside variants, which have their own; move it into a variant")
