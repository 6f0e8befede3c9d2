"""The units of a refitted layer: the same bytes from one worker and several, after lost workers, and after lost drivers."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checks import check
from pipeline.commands.plan import describe_plan
from pipeline.config import load_config
from pipeline.driver.outcome import Failure, Outcome
from pipeline.driver.worker import Worker
from pipeline.executors.base import Slot
from pipeline.executors.local import LocalExecutor
from pipeline.run.record import recorded_view
from pipeline.run.view import RunView
from stages.contracts.partition import held_bytes, weight_bytes
from stages.contracts.units import Unit
from stages.contracts.widths import ExpertSizes
from stages.recombine.calls import choice_bytes
from stages.recombine.needs import layer_bytes, layer_needs
from tests.runs import FinishedRun, digests, execute, write_run_file

Runs = Callable[[str], FinishedRun]
SETTINGS: dict[str, Any] = {
    "clustering.method": "pairs", "clustering.pair_cost": "elimination",
    "clustering.num_experts": [4], "calibration.tokens_per_shard": 64, "evaluation": None,
    "refit": {"mode": "sequential", "neurons": "choose"}, "export": {"formats": ["stock"], "router": "fitted"},
}  # fmt: skip
STEPS = ("source", "gather", "compare", "start", "choose", "solve", "advance")


def step_of(unit: Unit) -> str:
    return unit.call.function.rpartition(":")[2].removesuffix("_unit")


class Several(LocalExecutor):
    """Workers in this process, which run a unit each at a time; some are lost once, after what they wrote and before its seal.

    lost: steps of recombine.
    """

    num_workers = 3
    lost: Sequence[str] = ()

    def __init__(self) -> None:
        super().__init__()
        self._to_lose = list(self.lost)
        self._workers = {f"worker-{number}": Worker() for number in range(self.num_workers)}
        self.ran: dict[str, set[str]] = {}

    def free_slots(self) -> list[Slot]:
        busy = {slot.id for slot, _, _ in self._ended}
        return [Slot(name, is_worker=True) for name in self._workers if name not in busy]

    def submit(self, slot: Slot, unit: Unit) -> None:
        step = step_of(unit)
        if unit.stage == "recombine" and step in self._to_lose and unit.name.startswith("layer-0001"):
            self._to_lose.remove(step)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("pipeline.driver.worker.seal", lambda *_: {})
                outcome = self._workers[slot.id].run(unit)
            self._workers[slot.id] = Worker()
            self._ended.append((slot, unit, replace(outcome, failure=Failure("lost", "killed"))))
            return
        self._ended.append((slot, unit, outcome := self._workers[slot.id].run(unit)))
        assert isinstance(outcome, Outcome)
        if unit.stage == "recombine":
            self.ran.setdefault(step, set()).add(slot.id)


def solved(run: FinishedRun) -> dict[str, str]:
    """Digests of what recombine and the checkpoint hold."""
    (target,) = run.view.targets
    return digests(run.run_dir / run.part("recombine", target.part).dir, "*.*") | digests(run.model(target.part))


@pytest.fixture(scope="module")
def alone(finished_run: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FinishedRun]:
    """One worker, by mode."""
    return {
        mode: FinishedRun.of(run_file(finished_run, tmp_path_factory.mktemp(mode), mode)) for mode in ("sequential", "one_shot")
    }


def run_file(finished_run: Runs, folder: Path, mode: str, **settings: Any) -> Path:
    done = finished_run("mixtral")
    asked = {**SETTINGS, "refit": {**SETTINGS["refit"], "mode": mode}, **settings}
    return write_run_file(folder, done.source, Path(done.config.calibration.data[0]), asked)


@pytest.mark.parametrize("mode", ["sequential", "one_shot"])
def test_workers_share_a_layer_and_the_bytes_stay_though_one_is_lost_in_every_step(
    mode: str, tmp_path: Path, finished_run: Runs, alone: dict[str, FinishedRun]
) -> None:
    executors: list[Several] = []
    lost = [step for step in STEPS if mode == "sequential" or step != "advance"]

    def make() -> Several:
        executors.append(type("Struck", (Several,), {"lost": lost})())
        return executors[-1]

    path = run_file(finished_run, tmp_path, mode)
    result, recorder = execute(load_config(path, []), make)
    assert not executors[0]._to_lose, "every loss has struck"
    assert len(recorder.units) == result.num_run == len({unit.id for unit in recorder.units}), "no unit was sealed twice"
    assert solved(FinishedRun.found(path, load_config(path, []), result.report)) == solved(alone[mode])
    shared = {step for step, workers in executors[0].ran.items() if len(workers) > 1}
    assert {"source", "gather", "compare", "choose"} <= shared and (mode == "one_shot" or "advance" in shared)


class Interrupted(LocalExecutor):
    """Ends the driver before one unit."""

    stop: tuple[str, str]

    def submit(self, slot: Slot, unit: Unit) -> None:
        if unit.stage == "recombine" and (unit.name.split("/")[0], step_of(unit)) == self.stop:
            raise KeyboardInterrupt
        super().submit(slot, unit)


@pytest.mark.parametrize("step", STEPS)
def test_after_a_lost_driver_no_sealed_unit_runs_again(
    step: str, tmp_path: Path, finished_run: Runs, alone: dict[str, FinishedRun]
) -> None:
    path = run_file(finished_run, tmp_path, "sequential")
    with pytest.raises(KeyboardInterrupt):
        execute(load_config(path, []), type("Once", (Interrupted,), {"stop": ("layer-0001", step)}))
    sealed = set((tmp_path / "run").glob("recombine-*/manifests/**/*.json"))
    again = FinishedRun.of(path)
    ran = {again.run_dir / unit.part_dir / "manifests" / f"{unit.name}.json" for unit in again.recorder.units}
    assert sealed and not ran & sealed
    assert solved(again) == solved(alone["sequential"])


@pytest.mark.parametrize("executor", [LocalExecutor, Several])
def test_each_stream_lies_at_two_boundaries_at_most_and_nowhere_at_the_end(
    executor: type[LocalExecutor], tmp_path: Path, finished_run: Runs
) -> None:
    seen: list[Counter[str]] = []
    boundaries: list[set[str]] = []
    order: list[str] = []

    class Watching(executor):  # type: ignore[valid-type, misc]
        def submit(self, slot: Slot, unit: Unit) -> None:
            found = {path.parent / path.name.partition("-")[0] for path in (tmp_path / "run").glob("recombine-*/hidden/*/*")}
            seen.append(Counter(path.name for path in found if path.name != "given"))
            boundaries.append({path.parent.name for path in found if path.name != "given"})
            order.append(f"{unit.name.partition('/')[0]} {step_of(unit)}")
            super().submit(slot, unit)

    path = run_file(finished_run, tmp_path, "sequential")
    execute(load_config(path, []), Watching)
    assert {name: max(counts[name] for counts in seen) for name in ("tokens", "student")} == {"tokens": 2, "student": 2}
    assert executor is Several or max(map(len, boundaries)) == 2, "one worker has both streams at the same two"
    chosen = max(place for place, one in enumerate(order) if one == "layer-0001 choose")
    is_ahead = chosen < order.index("layer-0002 source") < order.index("layer-0001 advance")
    assert is_ahead == (executor is Several), "a worker that waits for a solution sends the source's stream on"
    left = [path for folder in ("hidden", "partial") for path in (tmp_path / "run").glob(f"recombine-*/{folder}/**/*.*")]
    assert not left


def test_memory_of_a_unit_counts_what_its_step_holds(alone: dict[str, FinishedRun]) -> None:
    """A layer; all tokens, too, where slots are compared, begun, chosen or solved; moments, where they are chosen or solved."""
    run = alone["sequential"].view
    needs = layer_needs(run, run.targets[0])
    units = {step_of(unit): unit.memory_bytes for unit in run.units("recombine") if unit.name.startswith("layer-0001")}
    beside = {"compare": needs.start_bytes, "start": needs.start_bytes}
    beside |= {"choose": needs.choose_bytes, "solve": needs.solve_bytes}
    assert units == {step: layer_bytes(run, 1, beside.get(step, 0)) for step in STEPS}
    weights = weight_bytes(run.survey, (1, 2))
    assert units["gather"] == held_bytes(run.survey, (1, 2), run.config.calibration)
    assert units["solve"] == weights + needs.solve_bytes > units["choose"] == weights + needs.choose_bytes > units["gather"]
    slots = 4 * 48 * needs.hidden_size  # of a matrix: W_down as the model has it; as float32, to start from and to write
    assert needs.solve_bytes > needs.token_bytes + needs.moment_bytes + slots * (3 * needs.itemsize + 4 + 8 + 4)
    assert needs.choose_bytes > needs.token_bytes + choice_bytes(needs.candidates) + slots * (3 * needs.itemsize + 4)


def test_memory_decides_how_slots_are_solved_and_the_plan_and_the_key_and_the_report_say_so(
    tmp_path: Path, finished_run: Runs, alone: dict[str, FinishedRun]
) -> None:
    """4 slots of 48 neurons: 192 columns, whose moments take 1.2 MB of a half of worker_memory."""
    config = load_config(run_file(finished_run, tmp_path, "sequential"), [])
    (target,) = alone["sequential"].view.targets

    def key(memory: str, **changes: Any) -> str:
        some = load_config(tmp_path / "run.yaml", [f"resources.worker_memory={memory}"])
        return RunView(some, replace(check(some).inputs, **changes)).part("recombine", target.part).key

    large = ExpertSizes(8, 14_336)
    assert key("80 GB", expert_sizes=large) == key("24 GB", expert_sizes=large) != key("16 GB", expert_sizes=large)
    assert key("16 GB", expert_sizes=None) != key("2 GB", expert_sizes=None), "a config that does not state its width"
    assert recorded_view(alone["sequential"].run_dir).part("recombine", target.part).key == key("16 GB")
    assert key("16 GB") == key("2 GB") != key("1 MB")
    for memory, how in (("8 GB", "all slots together"), ("1 MB", "slot after slot (more than 125 columns)")):
        some = load_config(tmp_path / "run.yaml", [f"resources.worker_memory={memory}"])
        lines = [str(line) for line in describe_plan(some)]
        assert [line for line in lines if f"W_down is solved for {how}" in line], lines
    small = FinishedRun.of(run_file(finished_run, tmp_path / "small", "sequential", resources={"worker_memory": "1 MB"}))
    facts = [
        [
            run.view.sealed(unit).facts["is_joint"]  # type: ignore[union-attr]
            for unit in run.view.units("recombine") if step_of(unit) == "solve"
        ]
        for run in (small, alone["sequential"])
    ]  # fmt: skip
    assert facts == [[False] * 3, [True] * 3]
    assert config.resources.worker_memory
    shutil.rmtree(tmp_path / "small")
