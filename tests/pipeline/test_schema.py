"""The JSON schema of run files takes what the program takes, and describes every setting."""

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import read_config
from pipeline.run.variants import methods, presets
from tests.conftest import REPOSITORY

BASE = {"model": "m", "run_dir": "r", "calibration": {"data": "a.txt"}, "clustering": {"num_experts": [4]}}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(CliRunner().invoke(app, ["schema"]).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def readme_run_files() -> Iterator[Any]:
    for block in (REPOSITORY / "README.md").read_text().split("```yaml\n")[1:]:
        yield yaml.safe_load(block.partition("```")[0])


GOOD: dict[str, dict[str, Any]] = {
    "the example": yaml.safe_load((REPOSITORY / "examples" / "tiny-mixtral.yaml").read_text()),
    "the readme": next(readme_run_files()),
    "the readme's variants": {**BASE, **list(readme_run_files())[1]},
    "all presets": {**BASE, "variants": sorted(presets())},
    "domains": {**BASE, "calibration": {"data": {"a": "a.txt", "b": ["b.txt"], "c": {"data": "c.jsonl", "weight": 2}}}},
    "widths": {**BASE, "clustering": {"method": "slim", "targets": [{"experts": 8, "width": 0.5}]}},
    "memory": {**BASE, "clustering": {"targets": [{"memory": "48 GB", "batch": 4, "keep": "width"}]}},
    "a share": {**BASE, "clustering": {"targets": [{"share": 0.5}]}},
    "a number a layer": {**BASE, "clustering": {"num_experts": [[4, 3, 2]]}, "export": {"formats": "tied"}},
    "a size": {**BASE, "resources": {"worker_memory": "8 GB"}},
}  # fmt: skip
BAD: dict[str, dict[str, Any]] = {
    "a misspelt section": {**BASE, "clusterin": {}},
    "a misspelt setting": {**BASE, "calibration": {"data": "a.txt", "num_sequence": 3}},
    "no data": {**BASE, "calibration": {}},
    "no target": {**BASE, "clustering": {"linkage": "ward"}},
    "two targets": {**BASE, "clustering": {"num_experts": [4], "targets": [4]}},
    "memory that is kept of nothing": {**BASE, "clustering": {"targets": [{"memory": "48 GB", "keep": "all"}]}},
    "a share of more than all": {**BASE, "clustering": {"targets": [{"share": 1.5}]}},
    "an unknown method": {**BASE, "clustering": {"num_experts": [4], "method": "best of all"}},
    "a setting of another method": {**BASE, "clustering": {"num_experts": [4], "method": "reap", "linkage": "ward"}},
    "an unknown linkage": {**BASE, "clustering": {"num_experts": [4], "linkage": "centroid"}},
    "an unknown preset": {**BASE, "variants": [{"name": "a", "preset": "b"}]},
    "a negative count": {**BASE, "calibration": {"data": "a.txt", "num_sequences": -1}},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_the_program_reads_is_valid(name: str, validator: jsonschema.Draft202012Validator) -> None:
    read_config(GOOD[name])
    assert [error.message for error in validator.iter_errors(GOOD[name])] == []


@pytest.mark.parametrize("name", BAD)
def test_what_it_refuses_is_not(name: str, validator: jsonschema.Draft202012Validator) -> None:
    assert list(validator.iter_errors(BAD[name]))


@pytest.mark.parametrize("method", sorted(methods()))
def test_every_method_can_be_named(method: str, validator: jsonschema.Draft202012Validator) -> None:
    values = {**BASE, "clustering": {"num_experts": [4], "method": method}}
    assert read_config(values).clustering.method == method
    assert list(validator.iter_errors(values)) == []


def test_settings_have_their_descriptions(validator: jsonschema.Draft202012Validator) -> None:
    definitions = validator.schema["$defs"]
    for section in ("Calibration", "Resources", "Export", "Refit", "Merging"):
        described = [name for name, value in definitions[section]["properties"].items() if value.get("description")]
        assert len(described) >= len(definitions[section]["properties"]) - 2, section
    assert "Tokens per sequence" in definitions["Calibration"]["properties"]["sequence_length"]["description"]


def test_values_of_the_wrong_type_are_refused_by_both(validator: jsonschema.Draft202012Validator) -> None:
    values = {**BASE, "calibration": {"data": "a.txt", "num_sequences": "many"}}
    assert list(validator.iter_errors(values))
    with pytest.raises(ValidationError):
        read_config(values)
