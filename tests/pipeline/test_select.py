"""Which units of a stage must run, from manifests and files alone."""

from pathlib import Path

import pytest

from pipeline.driver.selection import leftovers, select
from pipeline.driver.worker import Worker
from pipeline.state.manifest import FileRecord, manifest_path, read_manifest
from stages.contracts.units import Unit
from tests.pipeline.fake import OPENED, STAGE_DIR, at, chain, run_here, unit

UNITS = chain(num_shards=3, num_tokens=2)


def names(run_dir: Path, units: list[Unit] = UNITS, verify: bool = False) -> list[str]:
    return [one.name for one in select(at(run_dir, units), verify)]


def done(run_dir: Path, *wanted: str) -> None:
    """Run only these of the units, in their order."""
    run_here(run_dir, [one for one in UNITS if one.name in wanted])


def transient(run_dir: Path) -> set[str]:
    return {path.parent.name + "/" + path.name for path in run_dir.rglob("*") if path.parent.name in ("hidden", "partial")}


def unseal(run_dir: Path, name: str) -> None:
    (one,) = [one for one in UNITS if one.name == name]
    manifest_path(*at(run_dir, [one])).unlink()


def test_all_units_of_a_new_run_must_run_in_order(tmp_path: Path) -> None:
    assert names(tmp_path) == [one.name for one in UNITS]


def test_nothing_of_a_finished_stage_runs_though_its_transient_files_are_gone(tmp_path: Path) -> None:
    run_here(tmp_path, UNITS)
    assert transient(tmp_path) == set()
    assert names(tmp_path) == names(tmp_path, verify=True) == []


def test_a_stage_is_continued_where_it_stopped(tmp_path: Path) -> None:
    done(tmp_path, "shard-0-tokens-0", "shard-0-tokens-1", "shard-1-tokens-0")
    assert names(tmp_path) == ["shard-1-tokens-1", "shard-2-tokens-0", "shard-2-tokens-1", "sum-0", "sum-1", "sum-2"]
    assert transient(tmp_path) == {"hidden/1-1", "hidden/2-0", "partial/0-0", "partial/0-1", "partial/1-0"}


@pytest.mark.parametrize(
    ("lost", "runs_again"),
    [
        ("hidden/1-1", ["shard-0-tokens-1"]),
        ("hidden/2-0", ["shard-0-tokens-0", "shard-1-tokens-0"]),
        ("partial/0-1", ["shard-0-tokens-1"]),
        ("partial/1-0", ["shard-0-tokens-0", "shard-1-tokens-0"]),
    ],
)
def test_a_lost_transient_file_is_made_again_with_all_that_leads_to_it(
    tmp_path: Path, lost: str, runs_again: list[str]
) -> None:
    done(tmp_path, "shard-0-tokens-0", "shard-0-tokens-1", "shard-1-tokens-0")
    before = names(tmp_path)
    (tmp_path / STAGE_DIR / lost).unlink()
    assert names(tmp_path) == sorted([*runs_again, *before])
    run_here(tmp_path, select(at(tmp_path, UNITS), False))
    assert names(tmp_path) == []


def test_a_lost_result_brings_back_only_what_it_is_made_of(tmp_path: Path) -> None:
    run_here(tmp_path, UNITS)
    unseal(tmp_path, "sum-0")
    assert names(tmp_path) == ["shard-0-tokens-0", "shard-0-tokens-1", "sum-0"]
    (tmp_path / STAGE_DIR / "sum-2.txt").unlink()
    assert names(tmp_path) == [one.name for one in UNITS if one.name != "sum-1"]


def test_what_a_crash_left_between_seal_and_deletion_is_left_over(tmp_path: Path) -> None:
    run_here(tmp_path, UNITS)
    left = tmp_path / STAGE_DIR / "partial" / "0-1"
    left.write_text("left over")
    assert names(tmp_path) == []
    assert leftovers(UNITS, []) >= {f"{STAGE_DIR}/partial/0-1"}
    assert leftovers(UNITS, UNITS) == set()


def test_a_file_that_an_unsealed_maker_left_is_not_trusted(tmp_path: Path) -> None:
    done(tmp_path, "shard-0-tokens-0")
    unseal(tmp_path, "shard-0-tokens-0")
    assert "shard-0-tokens-0" in names(tmp_path)


def test_a_result_of_another_size_runs_again_and_one_of_other_bytes_under_verify(tmp_path: Path) -> None:
    one = unit("one")
    run_here(tmp_path, [one])
    path = tmp_path / STAGE_DIR / "one.txt"
    path.write_text("eno")
    assert names(tmp_path, [one]) == []
    assert names(tmp_path, [one], verify=True) == ["one"]
    path.write_text("longer")
    assert names(tmp_path, [one]) == ["one"]


def test_a_unit_that_fails_is_not_sealed(tmp_path: Path) -> None:
    for call, kind in (("fail_input", "input"), ("fail_error", "error")):
        bad = unit("bad", call=f"tests.pipeline.fake:{call}")
        failure = Worker().run(*at(tmp_path, [bad])).failure
        assert failure is not None and failure.kind == kind
        assert ("Traceback" in failure.detail) == (kind == "error")
        assert read_manifest(*at(tmp_path, [bad])) is None
        assert names(tmp_path, [bad]) == ["bad"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {}}'])
def test_a_damaged_manifest_seals_nothing(tmp_path: Path, content: str) -> None:
    one = unit("one")
    run_here(tmp_path, [one])
    manifest_path(*at(tmp_path, [one])).write_text(content)
    assert names(tmp_path, [one]) == ["one"]


def test_a_manifest_records_size_and_digest_of_each_file(tmp_path: Path) -> None:
    run_here(tmp_path, [unit("one")])
    manifest = read_manifest(*at(tmp_path, [unit("one")]))
    assert manifest is not None
    digest = "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    assert manifest.files == {f"{STAGE_DIR}/one.txt": FileRecord(3, digest)}


def test_a_worker_keeps_what_it_holds_until_another_hold_is_needed(tmp_path: Path) -> None:
    worker = Worker()
    units = [unit("a", hold="x"), unit("b"), unit("c", hold="x"), unit("d", on_worker=True), unit("e", hold="y")]
    OPENED.clear()
    held = []
    for one in at(tmp_path, units):
        outcome = worker.run(one)
        assert outcome.failure is None
        held.append(outcome.facts["held"])
    assert held == ["x", None, "x", None, "y"]
    assert OPENED == ["x", "y"], "b needs no room"
