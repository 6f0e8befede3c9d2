"""`schema`: the JSON schema of run files, for editors that complete and check YAML."""

from collections.abc import Iterable
from functools import reduce
from operator import or_
from typing import Any, TypedDict

from pydantic import JsonValue, create_model

from pipeline.run.variants import methods, presets
from stages.contracts.section import Section
from stages.contracts.settings import Clustering, RunConfig
from stages.registry import stage_specs

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


class _Definition(TypedDict):
    """What is changed of a section's schema."""

    properties: dict[str, dict[str, JsonValue]]
    required: list[str]
    oneOf: list[dict[str, list[str]]]


def run_file_schema() -> dict[str, JsonValue]:
    """What a run file may contain: every section of every stage, the settings of every method, the names of presets.

    What one setting says of another (a target within the model's experts) is not in it: `plan` checks that.
    """
    sections: dict[str, Any] = {name: (kind, kind()) for spec in stage_specs() for name, kind in spec.sections.items()}
    schema = create_model(
        "RunFile", __base__=RunConfig, **sections, clustering=(_any_of(one.settings for one in methods().values()), ...)
    ).model_json_schema()
    definitions: dict[str, _Definition] = schema["$defs"]
    for method in methods().values():
        _refine(definitions[method.settings.__name__], method.name)
    names: list[JsonValue] = [*sorted(presets())]
    definitions["VariantEntry"]["properties"]["preset"]["anyOf"] = [{"enum": names}, {"type": "null"}]
    return {"$schema": _DRAFT, **schema, "title": "hcsmoe run file"}


def _any_of(kinds: Iterable[type[Section]]) -> Any:
    return reduce(or_, kinds)


def _refine(clustering: _Definition, method: str) -> None:
    """`targets` is another name of `num_experts`, and one of them is needed. `method` is needed except for the default."""
    clustering["properties"]["targets"] = clustering["properties"]["num_experts"]
    clustering["required"] = [] if method == Clustering.model_fields["method"].default else ["method"]
    clustering["oneOf"] = [{"required": ["num_experts"]}, {"required": ["targets"]}]
