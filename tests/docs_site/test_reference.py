"""The reference says all that the code has: commands, settings, files, events, exit codes, the Python API."""

import importlib
import pkgutil
import re

import pyarrow as pa
import pytest
from typer.testing import CliRunner

import hcsmoe
import stages.contracts
from docs_site.api import api_page, explained
from docs_site.commands import commands, commands_page
from docs_site.events import events_page
from docs_site.exit_codes import _MORE, exit_codes_page
from docs_site.files import TABLES, files_page, meaning_of
from docs_site.settings import SECTIONS, all_sections, own_fields, settings_page
from pipeline.cli import app
from pipeline.commands.schema import run_file_schema
from pipeline.errors import EXIT_CODES
from stages.contracts import events


def test_every_option_that_help_prints_is_on_the_page_of_commands() -> None:
    sections = dict(zip(*[iter(re.split(r"^## hcsmoe (\S+)$", commands_page(), flags=re.MULTILINE)[1:])] * 2, strict=True))
    assert set(sections) == set(commands()) and len(sections) > 10
    for name, text in sections.items():
        printed = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", printed.split("Options")[1])) - {"--help"}
        assert options == set(
            re.findall(r"(?<=[`, ])--[a-z][a-z-]+", "\n".join(re.findall(r"^\| `-.*?` \|", text, re.MULTILINE)))
        ), name


def test_every_setting_is_on_the_page_with_its_meaning() -> None:
    page = settings_page()
    for section, kind in all_sections().items():
        for name, field in own_fields(kind).items():
            assert field.description, f"{section}: {name} has no docstring below it"
            assert f"| `{name}` |" in page
    assert "| `linkage` | `average`, `single`, `complete`, `ward` | `average` |" in page
    assert "| `worker_memory` | a size, such as `8 GB` | `8 GiB` |" in page
    shown = {kind.__name__ for kind in all_sections().values()}
    listed = {name for name, one in run_file_schema()["$defs"].items() if own_properties(one)}  # type: ignore[union-attr,index]
    assert listed - shown == set(), "a section of the run file is missing in docs_site/settings.py"
    assert set(SECTIONS) <= set(re.findall(r"^## (.*)$", page, re.MULTILINE))


def own_properties(definition: dict[str, dict[str, object]]) -> set[str]:
    """Settings that a method does not share with all methods."""
    return set(definition.get("properties", {})) - {"num_experts", "targets", "method", "domain_weights", "protect"}


def test_every_arrow_schema_is_on_the_page_of_files_and_every_column_has_a_meaning() -> None:
    found = set()
    for module in pkgutil.iter_modules(stages.contracts.__path__):
        values = vars(importlib.import_module(f"stages.contracts.{module.name}"))
        found |= {f"{module.name}.{name}" for name, value in values.items() if isinstance(value, pa.Schema)}
    assert found and found == {one.place for one in TABLES} - {"evidence.groups_schema"}
    for one in TABLES:
        assert meaning_of(one.schema, "table"), one.place
        for column in one.schema:
            assert meaning_of(one.schema, column.name), f"{one.place}: {column.name} has no meaning"
    assert all(f"`{name}`" in files_page() for name in ("gated_output_norm_sum", "weight_gram", "layer-0007.plan.arrow"))


def test_every_kind_of_event_and_every_field_is_on_the_page_of_events() -> None:
    kinds = [events.RUN_BEGINS, events.RUN_ENDS, events.STAGE_BEGINS, events.STARTED, events.SEALED, events.LOST, events.FAILED]
    assert set(events.KINDS) == set(kinds)
    page = events_page()
    assert all(f"| `{kind}` |" in page for kind in kinds)
    for name, field in events.Event.model_fields.items():
        assert field.description and f"| `{name}` |" in page


def test_every_exit_code_is_on_its_page() -> None:
    assert set(_MORE) == set(EXIT_CODES)
    assert all(f"| {code} | {meaning} |" in exit_codes_page() for code, meaning in EXIT_CODES.items())


def test_every_name_of_the_api_is_on_its_page() -> None:
    page = api_page()
    for name in set(hcsmoe.__all__) - {"__version__"}:
        assert f"## hcsmoe.{name}\n" in page
    assert "    data: Text,\n" in page and "-> Result" in page and "hcsmoe.Result.load\n" in page


@pytest.mark.parametrize(
    ("text", "intro", "meanings"),
    [
        ("A thing. one: first. two, three: both.", "A thing.", {"one": "first.", "two": "both.", "three": "both."}),
        ("A thing.\n\none: first, over\nlines.\n\nRaises it.", "A thing.\n\nRaises it.", {"one": "first, over lines."}),
        ("Nothing of it.", "Nothing of it.", {}),
    ],
)  # fmt: skip
def test_a_docstring_is_taken_apart(text: str, intro: str, meanings: dict[str, str]) -> None:
    assert explained(text, ["one", "two", "three"]) == (intro, meanings)
