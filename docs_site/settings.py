"""Page of all settings: of run files and batch files, with defaults and meanings, from the classes that check them."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich import filesize

from docs_site.markdown import escaped, page, table
from pipeline.commands.batch import BatchConfig, BatchEntry
from pipeline.run.variants import budgets, methods, presets
from stages.contracts.method import Preset
from stages.contracts.settings import (
    Budget,
    Clustering,
    Export,
    Merging,
    Refit,
    Resources,
    RunConfig,
    VariantEntry,
)
from stages.contracts.target_settings import MemoryTarget, ShareTarget, WidthTarget
from stages.contracts.text_settings import Calibration, Domain, Evaluation, Harness, Perplexity, Sampling
from stages.registry import stage_specs

SECTIONS: Mapping[str, type[BaseModel]] = {
    "calibration": Calibration,
    "calibration.data.DOMAIN": Domain,
    "calibration.sampling": Sampling,
    "clustering": Clustering,
    "clustering.targets, with a width": WidthTarget,
    "clustering.targets, by share": ShareTarget,
    "clustering.targets, by memory": MemoryTarget,
    "budget": Budget,
    "merging": Merging,
    "refit": Refit,
    "export": Export,
    "variants": VariantEntry,
    "evaluation": Evaluation,
    "evaluation.perplexity": Perplexity,
    "evaluation.harness": Harness,
    "resources": Resources,
}
"""Sections of a run file by their place in it, beside those of methods and of stages."""
BATCH: Mapping[str, type[BaseModel]] = {"Batch file": BatchConfig, "runs of a batch file": BatchEntry}
_CHOICES = {("clustering", "method"): methods, ("budget", "kind"): budgets, ("variants", "preset"): presets}
"""Settings whose values are the names in a table."""
_SAID = {
    (
        "clustering",
        "num_experts",
    ): "a target or a list of targets; a target is a whole number, a list of whole numbers, one for each "
    "layer, or one of the sections below",
    ("calibration", "data"): "text, a list of texts, or a mapping of domains",
    ("evaluation", "data"): "text, a list of texts, or a mapping of domains",
}
"""Values whose JSON schema is longer than words."""
_SIZE = {"integer", "string"}
"""Forms of a size in bytes."""


_BEGINNING = """
Every setting of a run file, with what it is when it is left out. `hcsmoe schema` prints the same for editors. A dotted name,
such as `clustering.linkage`, is the setting `linkage` in the section `clustering`: `--set clustering.linkage=single` sets it
on the command line.
"""


def all_sections() -> dict[str, type[BaseModel]]:
    """All that a page of settings has to say, in order."""
    of_methods = {f"clustering, method: {name}": method.settings for name, method in sorted(methods().items())}
    of_stages = {name: kind for spec in stage_specs() for name, kind in spec.sections.items()}
    return {"Run file": RunConfig, **SECTIONS, **of_stages, **of_methods, **BATCH}


def own_fields(kind: type[BaseModel]) -> dict[str, FieldInfo]:
    """Settings of a section; of a method those that the section `clustering` does not have anyway."""
    common = Clustering.model_fields if issubclass(kind, Clustering) and kind is not Clustering else {}
    return {name: field for name, field in kind.model_fields.items() if name not in common}


def settings_page() -> str:
    """The page."""
    lines = page("Settings", "docs_site/settings.py", _BEGINNING)
    for name, kind in all_sections().items():
        if fields := own_fields(kind):
            lines += _section(name, kind, fields)
    lines += ["## Presets", "", "What each preset sets; [Methods](../methods.md) says what it does.", ""]
    lines += table(("preset", "settings"), [(f"`{name}`", _preset_text(preset)) for name, preset in sorted(presets().items())])
    return "\n".join(lines)


def _preset_text(preset: Preset) -> str:
    return ", ".join(
        f"`{section}.{key}: {str(value).lower() if isinstance(value, bool) else value}`"
        for section, values in preset.items()
        for key, value in values.items()
    )


def _section(name: str, kind: type[BaseModel], fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    schema = kind.model_json_schema()
    yield from (f"## {name}", "", escaped(" ".join((kind.__doc__ or "").split())), "")
    rows = []
    for key, field in fields.items():
        values = _words(schema["properties"].get(key, {}), schema.get("$defs", {}))
        if (name, key) in _CHOICES:
            values = ", ".join(f"`{one}`" for one in sorted(_CHOICES[name, key]()))
        values = _SAID.get((name, key), values)
        rows.append(
            (f"`{key}`", values, default_of(field, schema["properties"].get(key, {})), escaped(field.description or ""))
        )
    yield from table(("setting", "values", "default", "meaning"), rows)


def _words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The values of a setting, said by its JSON schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "anything" if name == "JsonValue" else "a section" if "properties" in definitions[name] else "anything"
    forms = schema.get("anyOf") or schema.get("oneOf")
    if forms is not None:
        kinds = [form for form in forms if form.get("type") != "null"]
        if {form.get("type") for form in kinds} == _SIZE and len(kinds) == len(_SIZE):
            return "a size, such as `8 GB`"
        return " or ".join(dict.fromkeys(_words(form, definitions) for form in kinds))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"a list of: {_words(schema.get('items', {}), definitions)}"
    return _scalar(schema)


def _scalar(schema: Mapping[str, Any]) -> str:
    kinds = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "`true`, `false`",
        "object": "a mapping",
    }
    bounds = [
        f"{word} {schema[key]:,}"
        for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("exclusiveMaximum", "below"), ("maximum", "to"))
        if key in schema and schema[key] < 2**53
    ]
    return " ".join((kinds[schema["type"]], *bounds)) if "type" in schema else "anything"


def default_of(field: FieldInfo, schema: Mapping[str, Any]) -> str:
    """What a setting is when it is left out, as it would be written."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or value in ({}, ()):
        return ""
    if {form.get("type") for form in schema.get("anyOf", ())} == _SIZE:
        binary = value % 2**20 == 0
        return f"`{value // 2**30} GiB`" if binary else f"`{filesize.decimal(value)}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value != "" else ""
