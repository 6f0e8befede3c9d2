"""One contract, two executors: the same test bodies run in this process and on Ray."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.driver.loop import Driver
from pipeline.driver.outcome import Failure, Outcome
from pipeline.driver.run_state import UnitFailure
from pipeline.errors import RunFailed
from pipeline.executors.base import Executor, Slot
from pipeline.executors.local import LocalExecutor
from pipeline.executors.ray import RayExecutor
from pipeline.state.manifest import manifest_path, read_manifest
from stages.contracts.errors import InputError
from stages.contracts.settings import Resources
from stages.contracts.units import Job, NoFacts, Unit, UnitResult
from stages.io.files import write_bytes
from tests.pipeline.fake import RUN_DIR, STAGE_DIR, ToyArgs, ToyRun, at, chain, unit
from tests.runs import FinishedRun, write_run_file

Maker = Callable[[], Executor]
EXECUTORS = ["local", "ray"]


@pytest.fixture(params=EXECUTORS)
def make_executor(request: pytest.FixtureRequest) -> Maker:
    if request.param == "local":
        return LocalExecutor
    return request.getfixturevalue("on_ray")(num_gpus=0)


def drive(
    run_dir: Path, units: list[Unit], make_executor: Maker, max_attempts: int = 3
) -> tuple[dict[str, Outcome], list[UnitFailure]]:
    executor = make_executor()
    run = ToyRun(units, run_dir, max_attempts=max_attempts)
    try:
        Driver([run], executor, print).drive()
    finally:
        executor.close()
    return run.done_units, run.failures


def test_units_run_in_order_are_sealed_and_their_transient_files_are_gone(tmp_path: Path, make_executor: Maker) -> None:
    units = chain(num_shards=2, num_tokens=3)
    done, failures = drive(tmp_path, units, make_executor)
    assert failures == []
    assert set(done) == {one.name for one in units}
    for one in at(tmp_path, units):
        manifest = read_manifest(one)
        assert manifest is not None
        assert manifest.is_whole(one, verify=True)
    assert {path.name for path in (tmp_path / STAGE_DIR).rglob("*") if path.is_file()} == {
        *(f"{one.name}.json" for one in units), "sum-0.txt", "sum-1.txt",
    }  # fmt: skip


@pytest.mark.parametrize("on_worker", [False, True], ids=["task", "worker"])
def test_the_users_mistake_and_our_fault_are_told_apart(tmp_path: Path, make_executor: Maker, on_worker: bool) -> None:
    for call, kind, message in (
        ("fail_input", "input", "bad: the value is 3 but at most 2 fit; use 2"),
        ("fail_error", "error", "RuntimeError: bad broke"),
    ):
        bad = unit("bad", call=f"tests.pipeline.fake:{call}", on_worker=on_worker)
        _, (failed,) = drive(tmp_path, [bad, unit("after", after=(bad.id,))], make_executor)
        assert failed.outcome.failure is not None
        assert (failed.unit.name, failed.attempts) == ("bad", 1)
        assert (failed.outcome.failure.kind, failed.outcome.failure.message) == (kind, message)
        assert ("fake.py" in failed.outcome.failure.detail) == (kind == "error")
    assert list(tmp_path.rglob("*.json")) == []


def test_a_failed_stage_is_continued_after_the_mistake_is_mended(tmp_path: Path, make_executor: Maker) -> None:
    units = [
        unit("good"),
        unit("bad", call="tests.pipeline.fake:fail_input"),
        unit("last", after=(f"{RUN_DIR}/{STAGE_DIR}/bad",)),
    ]
    _, (failed,) = drive(tmp_path, units, make_executor)
    assert failed.unit.name == "bad"
    assert not manifest_path(*at(tmp_path, units[2:])).exists()
    mended = [units[0], unit("bad"), units[2]]
    done, failures = drive(tmp_path, [one for one in mended if read_manifest(*at(tmp_path, [one])) is None], make_executor)
    assert failures == []
    assert {"bad", "last"} <= set(done)


def die_once(job: Job[ToyArgs]) -> UnitResult[NoFacts]:
    """Kill this process, as a host that vanishes does; the second time, write."""
    mark = job.run_dir / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return UnitResult(NoFacts(), (write_bytes(job.part_dir / "alive.txt", b"alive"),))


def die(job: Job[ToyArgs]) -> UnitResult[NoFacts]:
    with (job.run_dir / "deaths").open("a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    return UnitResult(NoFacts())


@pytest.mark.parametrize("on_worker", [False, True], ids=["task", "worker"])
def test_a_unit_whose_process_is_killed_runs_again_elsewhere(
    tmp_path: Path, on_ray: Callable[..., Maker], on_worker: bool
) -> None:
    bad = unit("bad", call="tests.ray.test_executors:die_once", on_worker=on_worker)
    done, failures = drive(tmp_path, [bad, unit("after", after=(bad.id,))], on_ray(num_gpus=1))
    assert failures == []
    assert set(done) == {"bad", "after"}
    assert (tmp_path / STAGE_DIR / "alive.txt").read_bytes() == b"alive"


def meet(job: Job[ToyArgs]) -> UnitResult[NoFacts]:
    """Wait for the other unit of two, which must run meanwhile in another process."""
    (job.run_dir / f"here-{os.getpid()}").touch()
    until = time.monotonic() + 120
    while len(list(job.run_dir.glob("here-*"))) < 2:
        assert time.monotonic() < until, "nobody came"
        time.sleep(0.05)
    return UnitResult(NoFacts())


def test_as_many_units_run_at_once_as_there_are_workers(tmp_path: Path, on_ray: Callable[..., Maker]) -> None:
    units = [unit(name, call="tests.ray.test_executors:meet", on_worker=True) for name in ("a", "b")]
    done, failures = drive(tmp_path, units, on_ray(num_gpus=1), max_attempts=1)
    assert failures == []
    assert set(done) == {"a", "b"}


def test_a_unit_that_kills_its_process_again_and_again_fails(tmp_path: Path, on_ray: Callable[..., Maker]) -> None:
    bad = unit("bad", call="tests.ray.test_executors:die", on_worker=True)
    _, (failed,) = drive(tmp_path, [bad], on_ray(num_gpus=1), max_attempts=2)
    assert (tmp_path / "deaths").read_text() == "xx"
    assert failed.attempts == 2
    assert failed.outcome.failure is not None and failed.outcome.failure.kind == "lost"


def free(resource: str) -> float:
    return float(ray.available_resources().get(resource, 0))


def test_closing_gives_back_what_the_workers_had(tmp_path: Path, on_ray: Callable[..., Maker]) -> None:
    drive(tmp_path, [unit("a", on_worker=True), unit("b", on_worker=True)], on_ray(num_gpus=1))
    until = time.monotonic() + 120
    while free("GPU") < 2 or free("CPU") < 2:
        assert time.monotonic() < until, ray.available_resources()
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("resources", "num_workers"),
    [
        ({}, 2),
        ({"num_gpus": 1}, 2),
        ({"num_gpus": 2}, 1),
        ({"num_gpus": 0.5}, 2),
        ({"num_gpus": 0.5, "num_cpus": 2}, 1),
        ({"num_gpus": 0}, 2),
        ({"num_gpus": 1, "num_workers": 1}, 1),
    ],
    ids=str,
)
def test_there_are_as_many_workers_as_the_cluster_has_room_for(
    cluster: None, resources: dict[str, Any], num_workers: int
) -> None:
    assert RayExecutor(Resources(**resources)).num_workers == num_workers


def test_a_worker_that_fits_nowhere_is_said_to_be_missing(cluster: None) -> None:
    executor = RayExecutor(Resources(num_gpus=3))
    assert executor.why_idle().startswith(
        "waiting for a worker: each needs 1 CPUs and 3 GPUs; the cluster has 2 CPUs and 2 GPUs"
    )


def test_workers_that_die_with_their_node_do_not_count_as_workers_that_cannot_start(cluster: None) -> None:
    """Ray sends new workers to a node that died until it notices, and then all of them fail at once."""
    executor = RayExecutor(Resources(num_gpus=0))
    slot = Slot("worker-9", is_worker=True)

    def fail(kind: str) -> None:
        executor._started(slot, Outcome("", 0.0, {}, Failure(kind, "it died")))

    for kind in ("lost", "lost", *["node"] * 5):
        fail(kind)
    with pytest.raises(RunFailed, match=r"workers cannot start \(3 tries\): it died"):
        fail("lost")


CLUSTERS: dict[str, dict[str, Any]] = {
    "two workers with a GPU each": {"num_gpus": 1},
    "one worker with half a GPU": {"num_gpus": 0.5, "num_workers": 1, "layers_per_shard": 3},
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_run_on_ray_has_the_bytes_of_a_run_in_this_process(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun], on_ray: Callable[..., Maker], name: str
) -> None:
    """Statistics, dendrograms, labels and checkpoints; and losses, however many layers a layer shard has."""
    done = finished_run("mixtral")
    settings = {"clustering.num_experts": [6, 3], "resources": CLUSTERS[name]}
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), settings)
    other = FinishedRun.of(run_file, make_executor=on_ray(**CLUSTERS[name]))
    assert other.results() == done.results()
    assert [model["loss"] for model in other.report["models"]] == [model["loss"] for model in done.report["models"]]
    held = {one.hold.key for one in other.recorder.units if one.stage == "calibrate" and one.hold}
    is_one = CLUSTERS[name].get("num_workers") == 1
    assert len(held) == (1 if is_one else 3)
    processes = set()
    for one in other.recorder.units:
        if one.stage == "calibrate" and one.hold:
            processes.add(json.loads(manifest_path(one).read_text())["pid"])
    assert 1 <= len(processes) <= (1 if is_one else 2)  # a worker that comes late may find nothing left to do
    assert os.getpid() not in processes


def test_a_sampled_run_has_the_same_bytes_however_it_is_cut_and_whoever_computes_it(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun], on_ray: Callable[..., Maker]
) -> None:
    """Sums that only some methods need, too, and what is planned and merged from them."""
    done = finished_run("mixtral")
    sampling = {
        "calibration.sampling": {"fraction": 0.5, "groups": 3}, "clustering.num_experts": [6, 3], "evaluation": None,
        "clustering.feature": "token_wise", "merging.method": "zipit",
    }  # fmt: skip
    data = Path(done.config.calibration.data[0])
    one = FinishedRun.of(write_run_file(tmp_path / "one", done.source, data, sampling))
    others = {**sampling, "resources": {"layers_per_shard": 2, "num_gpus": 0}}
    run_file = write_run_file(tmp_path / "other", done.source, data, others)
    assert FinishedRun.of(run_file, make_executor=on_ray(num_gpus=0)).results() == one.results()


def test_a_run_that_fails_on_ray_names_the_failure_and_continues_in_this_process(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun], on_ray: Callable[..., Maker]
) -> None:
    done = finished_run("mixtral")
    run_file = write_run_file(tmp_path, done.source, Path(done.config.calibration.data[0]), {"clustering.num_experts": [6, 3]})
    with pytest.raises(InputError, match=r"calibration\.data holds 8 sequences of 32 token ids .* but num_sequences is 9"):
        FinishedRun.of(run_file, ["calibration.num_sequences=9"], on_ray(num_gpus=0))
    assert FinishedRun.of(run_file).results() == done.results()
