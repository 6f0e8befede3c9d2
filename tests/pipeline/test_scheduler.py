"""Which unit a slot gets next, and what becomes of a stage when units fail or workers die."""

import random
from collections import defaultdict

import pytest

from pipeline.driver.loop import Driver
from pipeline.driver.outcome import Failure, Outcome
from pipeline.driver.run_state import UnitFailure
from pipeline.driver.schedule import Schedule
from pipeline.errors import LockLost
from pipeline.executors.base import Slot
from stages.contracts.units import Unit
from tests.pipeline.fake import RUN_DIR, FakeExecutor, ToyRun, chain, unit

LOST = Failure("lost", "ActorDiedError: gone")


def drive(units: list[Unit], executor: FakeExecutor, max_attempts: int = 3) -> tuple[list[str], list[UnitFailure], list[str]]:
    """Names of the units that were done, in order; failures; warnings."""
    warnings: list[str] = []
    run = ToyRun(units, max_attempts=max_attempts)
    Driver([run], executor, warnings.append).drive()
    return list(run.done_units), run.failures, run.retries + warnings


def position_of_dependencies(units: list[Unit], done: list[str]) -> None:
    """Assert that each unit came after the makers of what it reads and after what it names."""
    makers = {path: one.name for one in units for path in one.writes}
    for one in units:
        before = {makers[path] for path in one.reads} | {identity.rsplit("/", 1)[1] for identity in one.after}
        assert all(done.index(other) < done.index(one.name) for other in before), one.name


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("tasks", [0, 2])
def test_all_units_run_once_and_after_what_they_need(workers: int, tasks: int) -> None:
    units = chain(num_shards=3, num_tokens=4)
    executor = FakeExecutor(workers, tasks)
    done, failures, _ = drive(units, executor)
    assert failures == []
    assert sorted(done) == sorted(one.name for one in units)
    position_of_dependencies(units, done)
    assert executor.num_idle_waits == 0


def test_one_worker_runs_units_in_the_order_given() -> None:
    units = chain(num_shards=2, num_tokens=3)
    done, _, _ = drive(units, FakeExecutor(workers=1))
    assert done == [one.name for one in units]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_each_layer_shard_is_loaded_once_by_one_worker(workers: int) -> None:
    executor = FakeExecutor(workers)
    drive(chain(num_shards=4, num_tokens=5), executor)
    workers_of = defaultdict(set)
    held: dict[str, list[str]] = defaultdict(list)
    for slot, name in executor.log:
        if name.startswith("shard-"):
            hold = name[:7]
            workers_of[hold].add(slot)
            if held[slot][-1:] != [hold]:
                held[slot].append(hold)
    assert all(len(slots) == 1 for slots in workers_of.values()), dict(workers_of)
    assert all(len(holds) == len(set(holds)) for holds in held.values()), dict(held)


def test_layer_shards_are_worked_on_at_the_same_time() -> None:
    executor = FakeExecutor(workers=3)
    drive(chain(num_shards=3, num_tokens=6), executor)
    assert executor.most_at_once == 3


def test_a_second_worker_does_not_open_a_layer_shard_that_one_has() -> None:
    schedule = Schedule()
    schedule.add(chain(num_shards=2, num_tokens=3))
    one, two = Slot("one", True), Slot("two", True)
    first = schedule.take(one)
    assert first is not None and first.name == "shard-0-tokens-0"
    assert schedule.take(two) is None
    schedule.finish(first)
    assert schedule.take(two) is not None, "what the first token shard left opens the next layer shard"


def test_a_worker_waits_for_its_own_layer_shard_rather_than_open_a_later_one() -> None:
    schedule = Schedule()
    schedule.add(chain(num_shards=3, num_tokens=2))
    slots = {0: Slot("one", True), 1: Slot("two", True)}

    def take(slot: int) -> Unit:
        taken = schedule.take(slots[slot])
        assert taken is not None
        return taken

    schedule.finish(take(0))
    slow = take(0)
    schedule.finish(take(1))
    assert schedule.take(slots[1]) is None, "shard-2-tokens-0 is ready, but its own shard-1-tokens-1 is to come"
    schedule.finish(slow)
    assert take(1).name == "shard-1-tokens-1"


def test_a_task_slot_gets_no_unit_that_needs_a_worker() -> None:
    schedule = Schedule()
    schedule.add([unit("merge", on_worker=True), unit("held", on_worker=True, hold="h"), unit("cpu")])
    task = Slot("task", False)
    taken = schedule.take(task)
    assert taken is not None and taken.name == "cpu"
    assert schedule.take(task) is None


def test_a_worker_helps_with_cpu_units_when_it_has_nothing_of_its_own() -> None:
    executor = FakeExecutor(workers=1)
    done, _, _ = drive([unit("cpu-0"), unit("cpu-1"), unit("merge", on_worker=True)], executor)
    assert done == ["merge", "cpu-0", "cpu-1"]


@pytest.mark.parametrize(("elapsed_s", "most_at_once"), [(0.01, 3), (5.0, 1)])
def test_only_units_known_to_be_short_wait_behind_others(elapsed_s: float, most_at_once: int) -> None:
    """Long ones stay in the driver: time spent waiting would count as time spent hanging."""
    executor = FakeExecutor(workers=0, tasks=1)
    executor.slots += [Slot(f"queued-{n}", is_worker=False, is_queued=True) for n in range(2)]
    executor.elapsed_s = elapsed_s
    units = [unit(f"cpu-{n}") for n in range(8)]
    done, failures, _ = drive(units, executor)
    assert (done, failures) == ([one.name for one in units], [])
    assert executor.most_at_once == most_at_once
    assert executor.log[0] == ("t0", "cpu-0")


def test_units_follow_those_that_they_name() -> None:
    a = unit("a")
    units = [unit("b", after=(a.id, f"{RUN_DIR}/toy-0/of-an-earlier-run")), a]
    assert drive(units, FakeExecutor(workers=2))[0] == ["a", "b"]


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("dies", ["shard-0-tokens-0", "shard-0-tokens-2", "shard-1-tokens-1", "shard-2-tokens-3", "sum-1"])
def test_a_unit_whose_worker_dies_is_given_to_another(workers: int, dies: str) -> None:
    """Also when the dead worker had an earlier layer shard, for which all others wait: nothing is stuck."""
    units = chain(num_shards=3, num_tokens=4)
    died: list[str] = []

    def outcome(slot: Slot, one: Unit) -> Failure | None:
        if one.name == dies and not died:
            died.append(slot.id)
            return LOST
        return None

    executor = FakeExecutor(workers, outcome=outcome)
    done, failures, warnings = drive(units, executor)
    assert failures == []
    assert sorted(done) == sorted(one.name for one in units)
    position_of_dependencies(units, done)
    attempts = [slot for slot, name in executor.log if name == dies]
    assert len(attempts) == 2
    assert attempts[1] != died[0]
    assert warnings == [f"{dies}: {LOST.message}; on another worker"]


def test_a_worker_that_waits_for_an_earlier_layer_shard_takes_it_over() -> None:
    """One of two workers dies and is not replaced; the other gives its layer shard up and comes back to it."""
    units = chain(num_shards=2, num_tokens=3)

    class Shrinking(FakeExecutor):
        def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
            ended = super().wait(timeout_s)
            self.slots = [slot for slot in self.slots if not slot.id.endswith("'")]
            return ended

    def outcome(slot: Slot, one: Unit) -> Failure | None:
        return LOST if slot.id == "w0" and one.name == "shard-0-tokens-1" else None

    executor = Shrinking(2, outcome=outcome)
    done, failures, _ = drive(units, executor)
    assert failures == []
    assert len(done) == len(units)
    assert ("w1", "shard-0-tokens-1") in executor.log


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_unit_out_of_memory_runs_alone_and_the_layer_shards_of_the_ended_workers_are_taken_up_again(workers: int) -> None:
    units = chain(num_shards=4, num_tokens=3)
    short = [Failure("memory", "out of memory")]
    executor = FakeExecutor(workers, outcome=lambda _, one: short.pop() if one.name == "shard-1-tokens-1" and short else None)
    done, failures, warnings = drive(units, executor)
    assert failures == []
    assert sorted(done) == sorted(one.name for one in units)
    assert warnings == ["shard-1-tokens-1: out of memory; alone"]
    again = executor.log.index(("all", "make room"))
    assert executor.log[again + 1][1] == "shard-1-tokens-1"


def test_a_unit_that_kills_every_worker_fails_after_max_attempts() -> None:
    executor = FakeExecutor(2, outcome=lambda slot, one: LOST if one.name == "shard-1-tokens-0" else None)
    _, failures, warnings = drive(chain(num_shards=3, num_tokens=2), executor, max_attempts=3)
    assert [(failed.unit.name, failed.attempts) for failed in failures] == [("shard-1-tokens-0", 3)]
    assert len(warnings) == 2


@pytest.mark.parametrize("kind", ["input", "error"])
def test_after_a_failure_nothing_starts_what_runs_may_end_and_every_failure_is_told(kind: str) -> None:
    units = [unit(f"unit-{n}") for n in range(8)]
    bad = {"unit-1", "unit-3"}
    executor = FakeExecutor(4, outcome=lambda slot, one: Failure(kind, "bad") if one.name in bad else None)
    done, failures, _ = drive(units, executor)
    assert [failed.unit.name for failed in failures] == ["unit-1", "unit-3"]
    assert all(failed.attempts == 1 for failed in failures), "a unit that fails by itself is not tried again"
    started = [name for _, name in executor.log]
    assert started == ["unit-0", "unit-1", "unit-2", "unit-3", "unit-4"]
    assert done == ["unit-0", "unit-2", "unit-4"]


def test_waiting_without_a_worker_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.driver.loop._IDLE_WARNING_S", -1)
    executor = FakeExecutor(0)
    waits = 0

    class LateWorker(FakeExecutor):
        def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
            nonlocal waits
            waits += 1
            if waits == 2:
                self.slots = [Slot("late", True)]
            return super().wait(timeout_s)

    executor = LateWorker(0)
    done, failures, warnings = drive([unit("a")], executor)
    assert (done, failures) == (["a"], [])
    assert warnings[0] == "no slot"


def test_a_stage_without_units_is_over_at_once() -> None:
    assert drive([], FakeExecutor(0)) == ([], [], [])


def test_a_unit_out_of_memory_is_tried_alone_once_however_often_it_was_lost_before() -> None:
    ends = {"hungry": [LOST, Failure("memory", "no memory left"), None], "glutton": [Failure("memory", "no memory left")] * 2}

    def outcome(slot: Slot, one: Unit) -> Failure | None:
        return ends[one.name].pop(0) if one.name in ends else None

    done, failures, _ = drive([unit("hungry"), unit("other")], FakeExecutor(2, outcome=outcome))
    assert (sorted(done), failures) == (["hungry", "other"], [])
    _, failures, _ = drive([unit("glutton")], FakeExecutor(1, outcome=outcome))
    assert [(failed.unit.name, failed.attempts) for failed in failures] == [("glutton", 2)]


def settled(schedule: Schedule, *slots: Slot) -> list[tuple[str, str, bool]]:
    return [(slot.id, hold.key, is_free) for slot, hold, is_free in schedule.ahead(slots)]


def taken(schedule: Schedule, slot: Slot) -> Unit:
    found = schedule.take(slot)
    assert found is not None
    return found


ONE, TWO, THREE = (Slot(name, True) for name in ("one", "two", "three"))


def test_a_worker_without_work_opens_its_layer_shard_before_any_unit_is_ready() -> None:
    schedule = Schedule()
    schedule.add(chain(num_shards=4, num_tokens=2))
    first = taken(schedule, ONE)
    assert schedule.take(TWO) is None
    assert settled(schedule, TWO, ONE) == [("two", "shard-1", True), ("one", "shard-2", False)]
    assert settled(schedule, TWO, ONE) == [("two", "shard-3", False)], "said once; then what follows"
    schedule.finish(first)
    assert taken(schedule, TWO).name == "shard-1-tokens-0"


def test_what_comes_next_goes_to_the_worker_that_is_done_first() -> None:
    schedule = Schedule()
    schedule.add(chain(num_shards=5, num_tokens=2))
    first = taken(schedule, ONE)
    schedule.finish(first)
    taken(schedule, TWO)
    assert settled(schedule, TWO, ONE) == [("one", "shard-2", False), ("two", "shard-3", False)]


def test_a_worker_that_comes_late_takes_what_a_busy_one_was_to_have_next() -> None:
    schedule = Schedule()
    schedule.add(chain(num_shards=3, num_tokens=2))
    first = taken(schedule, ONE)
    assert settled(schedule, ONE) == [("one", "shard-1", False)]
    assert settled(schedule, TWO, ONE) == [("two", "shard-1", True), ("one", "shard-2", False)]
    schedule.finish(first)
    assert taken(schedule, TWO).name == "shard-1-tokens-0"


def test_a_dead_worker_has_nothing_ahead() -> None:
    schedule = Schedule()
    schedule.add(chain(num_shards=3, num_tokens=2))
    first = taken(schedule, ONE)
    assert settled(schedule, ONE, TWO) == [("two", "shard-1", True), ("one", "shard-2", False)]
    schedule.release(TWO.id)
    assert settled(schedule, THREE) == [("three", "shard-1", True)]
    schedule.release(ONE.id)
    schedule.requeue(first)
    assert taken(schedule, THREE).name == "shard-0-tokens-0", "it gives up what it has opened: that needs this"


class Disorderly(FakeExecutor):
    """What runs ends in any order, and now and then otherwise than it should."""

    def __init__(self, chance: random.Random, ends: list[Failure]) -> None:
        super().__init__(chance.randint(1, 5), chance.randint(0, 2), self.end)
        self.chance, self.ends = chance, ends

    def end(self, slot: Slot, one: Unit) -> Failure | None:
        return self.ends.pop() if self.ends and self.chance.random() < 0.2 else None

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        self.chance.shuffle(self.running)
        return super().wait(timeout_s)


@pytest.mark.parametrize("seed", range(100))
def test_whatever_dies_and_in_whatever_order_units_end_all_are_done(seed: int) -> None:
    chance = random.Random(seed)
    units = chain(num_shards=chance.randint(1, 7), num_tokens=chance.randint(1, 6))
    deaths = [LOST, Failure("node", "gone"), Failure("memory", "short"), LOST, Failure("node", "gone")]
    done, failures, _ = drive(units, Disorderly(chance, deaths[: chance.randint(0, 5)]), max_attempts=10)
    assert (sorted(done), failures) == (sorted(one.name for one in units), [])
    position_of_dependencies(units, done)


@pytest.mark.parametrize("seed", range(100))
def test_after_a_failure_what_still_runs_is_done_and_the_loop_ends(seed: int) -> None:
    chance = random.Random(seed)
    units = chain(num_shards=chance.randint(1, 5), num_tokens=chance.randint(1, 4))
    executor = Disorderly(chance, [Failure("error", "broke"), LOST, Failure("input", "bad")])
    done, failures, _ = drive(units, executor)
    assert len(failures) <= 2
    assert len(done) + len(failures) <= len(units)
    assert len(failures) > 0 or len(done) == len(units)
    position_of_dependencies([one for one in units if one.name in done], done)


class Fenced(ToyRun):
    """A run whose lock is lost when one of its units ends, or while another run's do."""

    lost: LockLost | None = None
    loses_at = ""
    is_lost = False

    def check_lock(self) -> None:
        if self.is_lost:
            raise LockLost("lost")

    def started(self, unit: Unit, worker: str) -> None:
        self.is_lost |= unit.name == self.loses_at
        self.check_lock()

    def done(self, unit: Unit, outcome: Outcome) -> None:
        self.is_lost |= f"{unit.name} done" == self.loses_at
        self.check_lock()
        super().done(unit, outcome)

    def failed(self, failure: UnitFailure) -> None:
        self.check_lock()
        super().failed(failure)

    def lose(self, error: LockLost) -> None:
        self.lost, self.is_active = error, False


@pytest.mark.parametrize("loses_at", ["shard-0-tokens-0", "shard-1-tokens-1", "shard-0-tokens-1 done", "sum-1 done"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_that_has_lost_its_lock_stops_at_once_and_the_other_runs_go_on(loses_at: str, workers: int) -> None:
    units = chain(num_shards=3, num_tokens=2)
    fenced, other = Fenced(units, "/fenced"), ToyRun(units, "/other")
    fenced.loses_at = loses_at
    executor = FakeExecutor(workers)
    Driver([fenced, other], executor, print).drive()
    assert str(fenced.lost) == "lost"
    assert (fenced.failures, other.failures) == ([], [])
    assert sorted(other.done_units) == sorted(one.name for one in units)
    assert len(fenced.done_units) < len(units)
    of_fenced = [slot for slot, name in executor.log]
    assert {slot for slot, _ in executor.cancelled} <= set(of_fenced)


def test_what_runs_for_a_run_that_has_lost_its_lock_is_ended() -> None:
    """Though none of its units ends: the driver looks every second."""
    fenced = Fenced([unit("endless"), unit("next")], "/fenced")

    class Endless(FakeExecutor):
        def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
            self.now += timeout_s
            fenced.is_lost = self.now > 5
            assert self.now < 60, "it waits for what runs"
            return []

    executor = Endless(1)
    Driver([fenced], executor, print, executor.clock).drive()
    assert executor.cancelled == [("w0", "its run was stopped")]
    assert executor.log == [("w0", "endless")]


def test_a_unit_alone_of_a_run_that_has_lost_its_lock_is_in_nobodys_way() -> None:
    fenced, other = Fenced([unit("hungry")], "/fenced"), ToyRun([unit("other")], "/other")

    def outcome(slot: Slot, one: Unit) -> Failure | None:
        if one.name == "hungry":
            fenced.loses_at = "hungry"  # when it is started again
            return Failure("memory", "no memory left")
        return None

    Driver([fenced, other], FakeExecutor(1, outcome=outcome), print).drive()
    assert fenced.lost is not None
    assert list(other.done_units) == ["other"]


PASSING = Failure("passing", "OSError: [Errno 116] Stale file handle: '/run/x'")


def test_a_unit_whose_storage_was_away_is_tried_again_after_a_growing_pause_that_stops_nothing_else() -> None:
    ends = [PASSING, PASSING]
    executor = FakeExecutor(1, outcome=lambda slot, one: ends.pop() if one.name == "a" and ends else None)
    run = ToyRun([unit("a"), *(unit(f"cpu-{n}") for n in range(3))])
    started: list[tuple[str, float]] = []
    run.started = lambda one, worker: started.append((one.name, executor.now))  # type: ignore[method-assign]
    Driver([run], executor, print, executor.clock).drive()
    assert run.failures == []
    assert started == [("a", 0.0), ("cpu-0", 0.0), ("cpu-1", 0.0), ("cpu-2", 0.0), ("a", 5.0), ("a", 35.0)]
    assert run.retries == [
        f"a: {PASSING.message}; in 5 s (2 of 3)",
        f"a: {PASSING.message}; in 30 s (3 of 3)",
    ]


def test_a_storage_that_stays_away_fails_the_unit_after_as_many_tries_as_are_set() -> None:
    executor = FakeExecutor(2, outcome=lambda slot, one: PASSING if one.name == "a" else None)
    run = ToyRun([unit("a"), unit("b", after=(unit("a").id,))], max_attempts=2)
    Driver([run], executor, print, executor.clock).drive()
    assert [(failed.unit.name, failed.attempts) for failed in run.failures] == [("a", 2)]
    assert run.done_units == {}
    assert executor.now == 5.0


def test_a_run_that_fails_does_not_wait_for_a_pause_to_end() -> None:
    ends = {"a": PASSING, "b": Failure("error", "broke")}
    executor = FakeExecutor(2, outcome=lambda slot, one: ends[one.name])
    run = ToyRun([unit("a"), unit("b")])
    Driver([run], executor, print, executor.clock).drive()
    assert [failed.unit.name for failed in run.failures] == ["b"]
    assert executor.now == 0


class Hanging(FakeExecutor):
    """One unit never ends; while `opens` seconds have not passed, its worker opens what it needs."""

    def __init__(self, hangs: str, opens_s: float = 0) -> None:
        super().__init__(1)
        self.hangs, self.opens_s = hangs, opens_s

    def is_opening(self, slot: Slot) -> bool:
        return self.now < self.opens_s

    def wait(self, timeout_s: float) -> list[tuple[Slot, Unit, Outcome]]:
        if self.running and self.running[0][1].name == self.hangs:
            self.now += timeout_s
            if not self.cancelled:
                return []
            slot, one = self.running.pop(0)
            return [(slot, one, Outcome("host", 0.0, {}, Failure("lost", self.cancelled[-1][1])))]
        return super().wait(timeout_s)


def hung_after(executor: Hanging, runs: list[ToyRun]) -> tuple[float, str]:
    """When the unit that hangs was ended, and what was said."""
    Driver(runs, executor, print, executor.clock).drive()
    (failed,) = [failed for run in runs for failed in run.failures]
    assert failed.outcome.failure is not None
    return executor.now, failed.outcome.failure.message


@pytest.mark.parametrize(
    ("num_before", "elapsed_s", "limit_s"), [(0, 0.0, 7200), (3, 0.0, 600), (3, 50.0, 1000)], ids=["first", "short", "long"]
)
def test_a_unit_hangs_by_what_others_of_its_kind_took(num_before: int, elapsed_s: float, limit_s: float) -> None:
    executor = Hanging("hangs")
    executor.elapsed_s = elapsed_s
    run = ToyRun([*(unit(f"a{n}") for n in range(num_before)), unit("hangs")], max_attempts=1)
    ended_at, message = hung_after(executor, [run])
    assert limit_s < ended_at < limit_s + 3
    assert message == f"no result after {limit_s} s (resources.unit_timeout_s sets the limit)"


def test_what_the_units_of_a_tiny_model_take_does_not_limit_those_of_a_large_one_in_the_same_batch() -> None:
    executor = Hanging("large")
    executor.elapsed_s = 0.05
    tiny = ToyRun([unit(f"a{n}") for n in range(200)], "/tiny")
    large = ToyRun([unit("large")], "/large", max_attempts=1)
    ended_at, _ = hung_after(executor, [tiny, large])
    assert ended_at > 7200


def test_loading_a_layer_shard_has_a_limit_of_its_own() -> None:
    executor = Hanging("hangs", opens_s=10_000)
    run = ToyRun([unit("hangs", hold="h", on_worker=True)], max_attempts=1, unit_timeout_s=30)
    ended_at, message = hung_after(executor, [run])
    assert 10_030 < ended_at < 10_033, "the unit's own limit counts from when its layers are there"
    assert message == "no result after 30 s (resources.unit_timeout_s sets the limit)"


@pytest.mark.parametrize(("opened_s", "limit_s"), [(None, 14400), (1.0, 1800), (600.0, 12000)])
def test_a_worker_that_never_has_its_layers_is_ended(opened_s: float | None, limit_s: float) -> None:
    before = [] if opened_s is None else [unit("before", hold="g", on_worker=True)]
    executor = Hanging("hangs", opens_s=1e9)
    executor.open_s = opened_s or 0.0
    run = ToyRun([*before, unit("hangs", hold="h", on_worker=True)], max_attempts=1, unit_timeout_s=30)
    ended_at, message = hung_after(executor, [run])
    assert limit_s < ended_at < limit_s + 3
    assert message == f"its layers were not loaded after {limit_s} s"


def test_a_cpu_unit_on_a_worker_that_opens_ahead_has_the_limit_of_its_own_kind() -> None:
    """An idle worker opens what comes next, and is given a CPU unit meanwhile."""
    executor = Hanging("cpu", opens_s=1e9)
    run = ToyRun([unit("cpu")], max_attempts=1, unit_timeout_s=30)
    ended_at, message = hung_after(executor, [run])
    assert 30 < ended_at < 33
    assert message == "no result after 30 s (resources.unit_timeout_s sets the limit)"
