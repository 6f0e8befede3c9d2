"""Garbage in the records of a run directory: `run`, `status` and `clean` give one line, or take it as not there."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.run.record import read_record
from pipeline.state.events import EventLog, last_run
from stages.contracts.errors import InputError
from stages.contracts.events import EVENTS_FILE, FAILED, Event, now
from stages.contracts.partition import read_partition
from stages.io.storage import is_outside
from tests.runs import Call, FinishedRun, execute, write_run_file

GARBAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("3"),
    "a huge number": lambda path: path.write_text("9" * 10_000),
    "an empty object": lambda path: path.write_text("{}"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "wrong types": lambda path: path.write_text(json.dumps({key: ["x"] for key in json.loads(path.read_text())})),
    "a pipe": lambda path: [path.unlink(), os.mkfifo(path)],
    "a dangling link": lambda path: [path.unlink(), path.symlink_to("gone")],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path], token_ids: Path) -> FinishedRun:
    folder = tmp_path_factory.mktemp("base")
    settings = {"evaluation": None, "export.formats": ["tied"]}
    return FinishedRun.of(write_run_file(folder, tiny_checkpoint("mixtral"), token_ids, settings))


@pytest.fixture
def copy(tmp_path: Path, base: FinishedRun) -> FinishedRun:
    return base.copied(tmp_path)


@pytest.mark.parametrize("case", GARBAGE)
def test_a_damaged_run_json_is_one_line(copy: FinishedRun, call: Call, case: str) -> None:
    path = copy.run_dir / "run.json"
    GARBAGE[case](path)
    for arguments in (("status",), ("clean",), ("clean", "--yes")):
        code, out, err = call(*arguments, str(copy.run_dir))
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: {path}")
    assert not (copy.run_dir / "driver.lock").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda record: record.pop("format"),
            "was written by another version of hcsmoe (format 1, this is 3); use that version, or give another run_dir",
        ),
        (
            lambda record: record["config"]["clustering"].update(purity=1),
            "was written by another version of hcsmoe ('0.0.9', this is '0.1.0'): clustering.purity is not a setting: "
            "correct its name, or remove it; use that version, or give another run_dir",
        ),
        (
            lambda record: record["config"].pop("model"),
            "'0.0.9', this is '0.1.0'): model is missing: add it; use that version",
        ),
        (lambda record: record["identities"].pop("calibration"), "is no record of a run; run the run file again"),
        (lambda record: record["identities"].update(calibration={}), "is no record of a run; run the run file again"),
        (lambda record: record["identities"].update(calibration={"a/b": 3}), "is no record of a run; run the run file again"),
        (
            lambda record: record["identities"].update(calibration={"a/b": {"commit": "c", "files": 3}}),
            "is no record of a run; run the run file again",
        ),
        (lambda record: record.update(expert_sizes=[0, 48]), "expert_sizes.0: Input should be greater than 0"),
    ],
    ids=["format", "setting", "missing setting", "identity", "empty identity", "no digest", "no files", "sizes"],
)
def test_a_record_of_another_version_says_so(
    copy: FinishedRun, call: Call, change: Callable[[dict[str, object]], object], says: str
) -> None:
    path = copy.run_dir / "run.json"
    record = json.loads(path.read_text())
    record["hcsmoe"] = "0.0.9"
    change(record)
    path.write_text(json.dumps(record))
    for command in ("status", "clean"):
        code, out, err = call(command, str(copy.run_dir))
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"error: {path} ") and says in err
    if "format" not in record:
        with pytest.raises(InputError, match=r"another version of hcsmoe .*; use that version, or give another run_dir"):
            execute(copy.config)
        return
    execute(copy.config)
    assert read_record(copy.run_dir).config == copy.config


@pytest.mark.parametrize("case", [case for case in GARBAGE if case not in ("a pipe", "a dangling link")])
def test_bad_lines_of_the_log_are_passed_over_and_counted(copy: FinishedRun, call: Call, case: str) -> None:
    path = copy.run_dir / "events.jsonl"
    whole = path.read_text().splitlines()
    extra = copy.run_dir / "extra"
    extra.write_text(whole[0])
    GARBAGE[case](extra)
    content = extra.read_bytes().replace(b"\n", b" ").replace(b"\r", b" ")
    extra.unlink()
    if not content:
        content = b" "
    path.write_bytes(b"\n".join([content, *(line.encode() for line in whole), content, content]) + b"\n")
    code, out, err = call("status", str(copy.run_dir))
    assert (code, err) == (0, "")
    assert "3 lines of events.jsonl cannot be read" in out.splitlines()
    assert last_run(copy.run_dir).is_over
    assert last_run(copy.run_dir).reused.keys() >= {"prepare", "report"}


def test_values_of_odd_kinds_in_the_log_are_counted_too(copy: FinishedRun) -> None:
    odd = [
        {"event": "started", "time": 1, "unit": ["x"]},
        {"event": "started", "time": 1e300, "unit": "x"},
        {"event": "started", "time": -1, "unit": "x"},
        {"event": "started", "time": "1", "unit": "x"},
        {"event": 3, "time": 1},
        {"time": 1},
        {"event": "stage begins", "time": 1, "stage": "x", "num_reused": "many"},
    ]
    with open(copy.run_dir / "events.jsonl", "a") as out:
        out.writelines(json.dumps(line) + "\n" for line in odd)
    found = last_run(copy.run_dir)
    assert (found.num_unreadable, found.running, found.is_over) == (len(odd), {}, True)


def test_a_line_without_end_is_read_in_pieces(copy: FinishedRun) -> None:
    with open(copy.run_dir / "events.jsonl", "ab") as out:
        out.write(b"x" * (3 << 20))
    assert last_run(copy.run_dir).num_unreadable == 3


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "folder"])
def test_status_without_a_log_that_can_be_read_shows_the_rest(
    copy: FinishedRun, call: Call, make: Callable[[Path], object]
) -> None:
    path = copy.run_dir / "events.jsonl"
    path.unlink()
    make(path)
    code, out, err = call("status", str(copy.run_dir))
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith(str(path))]
    assert line.endswith("a regular file is needed; what ran is not known")
    assert "│ calibrate" in out


def test_names_in_the_log_are_escaped(copy: FinishedRun, call: Call) -> None:
    log = EventLog(copy.run_dir, lambda: None)
    log.write(Event(time=now(), event=FAILED, unit="merge-x/\x1b[2Ja\nerror: b", message="[red]c\ud800", host="h"))
    code, out, err = call("status", str(copy.run_dir))
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "merge-x/\\x1b[2Ja\n  error: b: [red]c\\ud800" in out


@pytest.mark.parametrize("case", GARBAGE)
def test_a_damaged_identity_is_written_anew_and_never_a_reason(copy: FinishedRun, call: Call, case: str) -> None:
    old = copy.run_dir / copy.part("cluster").dir / "identity.json"
    GARBAGE[case](old)
    new = FinishedRun.of(copy.run_file, ["clustering.linkage=single"])
    GARBAGE[case](new.run_dir / new.part("report").dir / "identity.json") if case != "a pipe" else None
    code, _, err = call("status", str(copy.run_dir))
    assert (code, err) == (0, "")
    code, out, err = call("clean", str(copy.run_dir))
    assert (code, err) == (0, "")
    assert copy.part("cluster").dir not in out, "a folder without its identity is nobody's to remove"


def test_a_damaged_identity_of_a_stage_that_is_used_is_written_anew(copy: FinishedRun) -> None:
    path = copy.run_dir / copy.part("cluster").dir / "identity.json"
    whole = path.read_bytes()
    path.write_text('{"stage": "cluster"}')
    execute(copy.config)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("case", GARBAGE)
def test_a_damaged_partition_is_made_anew(copy: FinishedRun, case: str) -> None:
    path = copy.run_dir / copy.part("calibrate").dir / "partition.json"
    whole = path.read_bytes()
    GARBAGE[case](path)
    assert read_partition(path, 3) is None
    shutil.rmtree(path.parent / "manifests")
    result, _ = execute(copy.config)
    assert result.num_run > 0
    assert path.read_bytes() == whole and not path.is_symlink()


@pytest.mark.parametrize(
    "shards", [[], [[0, 2]], [[0, 2], [1, 3]], [[0, 0], [0, 3]], [[1, 3]], [[0, 4]], [[2, 3], [0, 2]], [[0, 3, 5]]]
)
def test_a_partition_covers_every_layer_once_or_is_made_anew(tmp_path: Path, shards: list[list[int]]) -> None:
    path = tmp_path / "partition.json"
    path.write_text(json.dumps({"asked": {}, "layer_shards": shards}))
    assert read_partition(path, 3) is None
    path.write_text(json.dumps({"asked": {}, "layer_shards": [[0, 2], [2, 3]]}))
    found = read_partition(path, 3)
    assert found is not None and found.layer_shards == [(0, 2), (2, 3)]


@pytest.mark.parametrize("case", GARBAGE)
def test_a_damaged_plan_is_one_line_or_made_anew(copy: FinishedRun, call: Call, case: str) -> None:
    """One of another size is made anew; one of the same size is not what was sealed."""
    path = copy.run_dir / copy.part("prepare", "model").dir / "plan.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"num_layers": 3', b'"num_layers": 9'))
    for arguments in (("status", str(copy.run_dir)), ("run", str(copy.run_file), "--executor", "local")):
        code, _, err = call(*arguments)
        assert code == 2
        assert f"error: {path} is not what the survey wrote; run again with --from prepare\n" in err
    path.write_bytes(whole)
    GARBAGE[case](path)
    assert call("status", str(copy.run_dir))[0] == 0
    execute(copy.config)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("case", GARBAGE)
def test_a_damaged_manifest_seals_nothing(copy: FinishedRun, call: Call, case: str) -> None:
    path = copy.run_dir / copy.part("cluster").dir / "manifests" / "layer-0001.json"
    whole = json.loads(path.read_text())
    GARBAGE[case](path)
    assert call("status", str(copy.run_dir))[0] == 0
    _result, recorder = execute(copy.config)
    assert [unit.name for unit in recorder.units if unit.stage != "report"] == ["layer-0001"]
    assert json.loads(path.read_text())["files"] == whole["files"]


def test_a_manifest_of_another_unit_seals_nothing(copy: FinishedRun) -> None:
    folder = copy.run_dir / copy.part("cluster").dir / "manifests"
    shutil.copy(folder / "layer-0000.json", folder / "layer-0001.json")
    _, recorder = execute(copy.config)
    assert [unit.name for unit in recorder.units if unit.stage != "report"] == ["layer-0001"]


def test_no_record_is_read_without_a_bound(copy: FinishedRun) -> None:
    with open(copy.run_dir / "run.json", "wb") as out:
        out.truncate(1 << 33)
    with pytest.raises(InputError, match="8,589,934,592 bytes; at most"):
        read_record(copy.run_dir)


def test_an_event_that_finds_no_room_names_the_log(tmp_path: Path) -> None:
    """As any error of the file system has to, to be one line."""
    (tmp_path / EVENTS_FILE).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as raised:
        EventLog(tmp_path, lambda: None).write(Event(time=1.0, event="x"))
    assert is_outside(raised.value) and raised.value.filename == str(tmp_path / EVENTS_FILE)
