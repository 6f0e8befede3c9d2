"""What stages declare of themselves."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import get_args, get_type_hints

import pytest

from pipeline.imports import resolve
from stages.contracts.spec import StageSpec
from stages.contracts.units import Held, HoldCall, Job, UnitCall, UnitResult
from stages.registry import STAGES, stage_specs


def calls() -> Iterator[tuple[str, object]]:
    """Every kind of unit and of hold, by its function: of a stage's spec, and of files that it takes them from."""
    found: dict[str, object] = {}
    for stage in STAGES:
        folder = importlib.import_module(f"stages.{stage}").__path__
        for module in pkgutil.iter_modules(folder, f"stages.{stage}."):
            values = vars(importlib.import_module(module.name)).values()
            found |= {value.function: value for value in values if isinstance(value, UnitCall | HoldCall)}
    yield from found.items()


@pytest.mark.parametrize(("function", "call"), [pytest.param(*one, id=one[0]) for one in calls()])
def test_a_function_takes_the_arguments_and_returns_the_facts_that_its_spec_declares(function: str, call: object) -> None:
    """The type checker cannot follow a function's name; this test does."""
    hints = get_type_hints(resolve(function))
    given, result = hints["job" if "job" in hints else "args"], hints["return"]
    if isinstance(call, HoldCall):
        assert given is call.args
        assert isinstance(result, type) and hasattr(result, "close") and hasattr(result, "read_ahead"), Held
        return
    assert isinstance(call, UnitCall)
    if "job" not in hints:  # a rehearsal
        assert given is call.args
        return
    assert issubclass(given.__origin__, Job)
    assert get_args(given)[0] is call.args
    assert result.__origin__ is UnitResult and get_args(result) == (call.facts,)


@pytest.mark.parametrize("spec", stage_specs(), ids=lambda spec: spec.name)
def test_a_stage_waits_for_earlier_stages_only(spec: StageSpec) -> None:
    earlier = STAGES[: STAGES.index(spec.name)]
    assert {*spec.after, *spec.beside} <= set(earlier)
    assert spec.version >= 1


def test_one_stage_makes_the_survey_that_the_others_read() -> None:
    assert [spec.name for spec in stage_specs() if spec.makes_survey] == ["prepare"]
