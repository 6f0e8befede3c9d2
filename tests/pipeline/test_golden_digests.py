"""A stage that computes something else has another version: else old results would be reused as if they were new ones."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.golden_digests import COMMAND, RECORD, UPSTREAM, VERSIONS, changed_without_a_version, differences, found_in


def test_every_stage_makes_what_is_recorded_for_its_version(tmp_path: Path) -> None:
    recorded, found = json.loads(RECORD.read_text()), found_in(tmp_path / "work")
    for stage, lines in changed_without_a_version(found, recorded, VERSIONS).items():
        pytest.fail(f"raise the version in stages/{stage}/spec.py and run `{COMMAND}` to record anew\n" + "\n".join(lines[:10]))
    assert recorded["versions"] == VERSIONS, f"versions were raised: run `{COMMAND}` to record anew"
    left = [line for stage in UPSTREAM for line in differences(found[stage], recorded["stages"][stage], stage)]
    assert left == [], f"run `{COMMAND}` to record anew"


@pytest.fixture
def recorded() -> Any:
    return json.loads(RECORD.read_text())


def test_a_change_is_found_in_the_stage_that_made_it_and_a_new_version_allows_it(recorded: Any) -> None:
    """Statistics that differ change clusters and all that follows; only calibrate is at fault."""
    found = copy.deepcopy(recorded["stages"])
    name = next(iter(found["calibrate"]))
    found["calibrate"][name]["gate_sum"]["numbers"][0] *= 1.001
    for labels in found["cluster"].values():
        labels[next(iter(labels))] = {"digest": "another"}
    (stage, lines), *others = changed_without_a_version(found, recorded, recorded["versions"]).items()
    assert (stage, others) == ("calibrate", [])
    assert lines[0].startswith(f"calibrate/{name}/gate_sum/numbers: [")
    raised = {**recorded["versions"], "calibrate": recorded["versions"]["calibrate"] + 1}
    assert changed_without_a_version(found, recorded, raised) == {}


def test_roundings_are_no_change_and_anything_else_is(recorded: Any) -> None:
    stages = recorded["stages"]
    assert differences({"numbers": [1.0, 2.0]}, {"numbers": [1.000001, 2.0]}) == []
    assert differences({"numbers": [1.0, 2.0]}, {"numbers": [1.001, 2.0]}, "x") == [
        "x/numbers: [1.0, 2.0] instead of [1.001, 2.0]"
    ]
    assert differences({"numbers": [1.0]}, {"numbers": [1.0, 2.0]}) != []
    assert differences({"digest": "a"}, {"digest": "b"}, "x") == ["x/digest: a instead of b"]
    assert differences({"a": 1, "b": 2}, {"a": 1}, "x") == ["x: ['a', 'b'] instead of ['a']"]
    assert set(stages) == set(UPSTREAM) == set(VERSIONS)
