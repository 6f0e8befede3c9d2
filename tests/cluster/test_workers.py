"""Workers that die, hang or run out of memory."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from pipeline.driver.timeouts import Timeouts
from pipeline.errors import RunFailed
from stages.contracts.settings import RunConfig
from tests.cluster.faults import FaultyExecutor
from tests.runs import FinishedRun, execute

pytestmark = pytest.mark.slow
RunFile = Callable[[dict[str, Any]], Path]
Struck = Callable[[RunConfig, dict[str, str], Path], FaultyExecutor]

KILLS = {
    "prepare/survey": "kill before seal",
    "calibrate/layers-0002-0004/tokens-0001": "kill before",
    "calibrate/layers-0004-0006/tokens-0002": "kill before seal",
    "calibrate/layer-0005": "kill before seal",
    "cluster/layer-0003": "kill before",
    "merge/model-00002-of-*": "kill before seal",
    "merge/model-00003-of-*": "kill before",
    "assemble/checkpoint": "kill before seal",
    "evaluate/layers-0002-0004/tokens-0000": "kill before",
    "evaluate/perplexity": "kill before seal",
}


def test_a_worker_killed_in_any_stage_loses_nothing(
    struck: Struck, run_file: RunFile, undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Killed before the unit, or between its last write and its seal: the finished bytes are those of a local run."""
    path = run_file({})
    config = load_config(path, [])
    result, recorder = execute(config, lambda: struck(config, KILLS, tmp_path))
    assert len(list(tmp_path.iterdir())) == len(KILLS), "every fault struck"
    assert len(recorder.units) == result.num_run == len({unit.id for unit in recorder.units}), "no unit was sealed twice"
    assert FinishedRun.found(path, config, result.report).results() == undisturbed
    events = [json.loads(line) for line in (Path(config.run_dir) / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "lost" for event in events) >= len(KILLS)


def test_a_unit_that_fails_each_time_ends_the_run_and_nothing_else(
    struck: Struck, run_file: RunFile, undisturbed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """The failure is named with unit, node and cause; what ran beside it is sealed; a later run does the rest."""
    path = run_file({})
    config = load_config(path, [])
    executor: list[FaultyExecutor] = []

    def make_executor() -> FaultyExecutor:
        executor.append(struck(config, {"cluster/layer-0003": "always error"}, tmp_path))
        return executor[0]

    with pytest.raises(RunFailed, match=r"cluster layer 3 on \S+: ZeroDivisionError: a unit that cannot work"):
        execute(config, make_executor)
    assert sum("layer-0003" in unit for unit in executor[0].submitted if "/cluster-" in unit) == 1, "not tried again"
    assert not (Path(config.run_dir) / "models").exists()
    assert FinishedRun.of(path).results() == undisturbed


def test_units_that_hang_or_lack_memory_once_are_given_to_another_worker(
    struck: Struck,
    run_file: RunFile,
    undisturbed: dict[str, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the unit that hangs has a short limit: every other may take as long as a busy machine needs."""
    hangs = "layers-0002-0004/tokens-0001"
    path = run_file({})
    config = load_config(path, [])
    limit_s = Timeouts.unit_s
    monkeypatch.setattr(Timeouts, "unit_s", lambda *args: 25.0 if args[1].name == hangs else limit_s(*args))
    faults = {f"calibrate/{hangs}": "hang", "calibrate/layers-0004-0006/tokens-0002": "memory"}
    result, _ = execute(config, lambda: struck(config, faults, tmp_path))
    assert len(list(tmp_path.iterdir())) == len(faults), "every fault struck"
    assert FinishedRun.found(path, config, result.report).results() == undisturbed
    events = (Path(config.run_dir) / "events.jsonl").read_text()
    assert "no result after 25 s" in events
    assert "cannot allocate what the unit needs" in events


def test_a_unit_that_never_has_enough_memory_is_tried_alone_and_tells_what_it_needs(
    struck: Struck, run_file: RunFile, tmp_path: Path
) -> None:
    config = load_config(run_file({}), [])
    faults = {"calibrate/layers-0002-0004/tokens-0001": "always memory"}
    with pytest.raises(
        RunFailed, match=r"(?s)layers 2-3, tokens 2/4.*tried 2 times.*it needs about .*resources\.layers_per_shard"
    ):
        execute(config, lambda: struck(config, faults, tmp_path))
