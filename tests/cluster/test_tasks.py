"""Tasks on a cluster whose workers are killed: every score is that of a run that nothing disturbs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from stages.contracts.settings import RunConfig
from tests.cluster.faults import FaultyExecutor
from tests.conftest import REPOSITORY
from tests.harness_tasks import write_tasks
from tests.runs import FinishedRun, execute, write_run_file

pytest.importorskip("lm_eval", reason="tasks need the extra `eval`")
pytestmark = pytest.mark.slow
Struck = Callable[[RunConfig, dict[str, str], Path], FaultyExecutor]

TEXTS = REPOSITORY / "examples" / "text"
KILLS = {
    "requests/requests": "kill before seal",
    "evaluate/layers-0000-0002/tokens-0001": "kill before",
    "evaluate/tokens-0002": "kill before seal",
    "evaluate/prompts-0001": "kill before seal",
    "evaluate/scores": "kill before seal",
}


def test_a_worker_killed_in_the_middle_of_a_task_loses_nothing(struck: Struck, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    common = {"num_sequences": 2, "sequence_length": 64}
    harness = {"include_path": str(tasks), "tokens_per_shard": 150, "max_length": 60, "prompts_per_slice": 5}
    values: dict[str, Any] = {
        "calibration": {"data": str(TEXTS / "calibration-fiction.jsonl"), **common},
        "evaluation": {
            "data": str(TEXTS / "heldout-fiction.jsonl"), "tasks": ["tiny_choice", "tiny_answer"], "harness": harness, **common,
        },
        "clustering.num_experts": [3], "export.formats": ["stock"], "resources.layers_per_shard": 2,
    }  # fmt: skip
    path = write_run_file(tmp_path / "run", REPOSITORY / "examples" / "tiny-mixtral", Path("unused"), values)
    alone = FinishedRun.of(path, [f"run_dir={tmp_path / 'alone'}"])
    config = load_config(path, [])
    markers = tmp_path / "markers"
    markers.mkdir()
    result, recorder = execute(config, lambda: struck(config, KILLS, markers))
    assert len(list(markers.iterdir())) == len(KILLS), "every fault struck"
    assert len(recorder.units) == result.num_run == len({unit.id for unit in recorder.units}), "no unit was sealed twice"
    events = [json.loads(line) for line in (Path(config.run_dir) / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "lost" for event in events) >= len(KILLS)
    assert [one["tasks"] for one in result.report["models"]] == [one["tasks"] for one in alone.report["models"]]
    assert result.shortfalls == ()
