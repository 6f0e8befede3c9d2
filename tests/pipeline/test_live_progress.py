"""How far a run is, on one screen or in few lines, from its events; and what `status --watch` makes of the log."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.commands.watch import watch
from pipeline.display.progress import QUIET_S, Reporter
from pipeline.display.screen import duration_text, screen, stage_line
from pipeline.state.events import Follower
from pipeline.state.progress import RunProgress
from stages.contracts.errors import InputError
from stages.contracts.events import EVENTS_FILE, FAILED, LOST, RUN_BEGINS, RUN_ENDS, SEALED, STAGE_BEGINS, STARTED, Event
from tests.runs import FinishedRun

REPOSITORY = Path(__file__).parents[2]
STAGES = ["prepare", "calibrate", "merge"]


def begun(num_units: int, kinds: dict[str, int]) -> list[Event]:
    """A run that begins, with its first stage done and the second listed."""
    return [
        Event(time=1000, event=RUN_BEGINS, stages=STAGES, num_workers=2),
        Event(time=1000, event=STAGE_BEGINS, stage="prepare", num_reused=5),
        Event(time=1000, event=STAGE_BEGINS, stage="calibrate", num_units=num_units, kinds=kinds),
    ]


def given(at: float, name: str, worker: str = "") -> Event:
    hold = "calibrate tiny, layers 0-3" if worker else ""
    return Event(time=at, event=STARTED, stage="calibrate", unit=f"calibrate-0/{name}", worker=worker, hold=hold)


def ended(at: float, name: str, elapsed_s: float, event: str = SEALED) -> Event:
    return Event(
        time=at, event=event, stage="calibrate", unit=f"calibrate-0/{name}", host="node-7", elapsed_s=elapsed_s,
        peak_bytes=2_100_000_000, bytes_read=3_000_000_000, bytes_written=1_000_000_000, num_tokens=8000,
    )  # fmt: skip


def progress_of(*events: Event) -> RunProgress:
    progress = RunProgress()
    for event in events:
        progress.note(event)
    return progress


def drawn(progress: RunProgress, now: float, width: int = 120, height: int = 40) -> list[str]:
    console = Console(file=io.StringIO(), record=True, width=width, height=height, force_terminal=True)
    console.print(screen(progress, now, height))
    return console.export_text().splitlines()


def row(lines: list[str], name: str) -> list[str]:
    (line,) = [line for line in lines if line.split()[:1] == [name]]
    return line.split()


def test_time_left_is_that_of_medians_by_kind_of_unit() -> None:
    """Two workers: 3 of 10 long units took 2, 4 and 60 s, one of 4 short ones 0.5 s, in 40 s. At the medians, 4 and 0.5 s, 7
    and 3 are left: 29.5 s of work, and 66.5 s were done in 40 s."""
    units = [("tokens-1", 2.0), ("tokens-2", 60.0), ("tokens-3", 4.0), ("layer-1", 0.5)]
    events = [event for name, seconds in units for event in (given(1000, name), ended(1040, name, seconds))]
    progress = progress_of(*begun(14, {"tokens-#": 10, "layer-#": 4}), *events)
    assert progress.left_s(1040) == pytest.approx(29.5 / (66.5 / 40))
    assert progress.stages["merge"].num_units is None and progress.num_unlisted == 1
    none_done = progress_of(*begun(14, {"tokens-#": 14}))
    assert none_done.left_s(1001) is None


def test_the_screen_shows_stages_rates_time_left_and_workers() -> None:
    progress = progress_of(
        *begun(8, {"tokens-#": 8}),
        given(1000, "tokens-1", "worker-1"), given(1000, "tokens-2", "worker-0"), given(1001, "layer-1"),
        ended(1004, "tokens-1", 4.0), given(1004, "tokens-3", "worker-1"),
    )  # fmt: skip
    lines = drawn(progress, 1010)
    assert row(lines, "prepare")[-5:] == ["5/5", "-", "-", "-", "done"]
    assert row(lines, "calibrate")[-7:] == ["1/8", "800", "0.400", "10", "s", "28", "s"]
    assert row(lines, "merge") == ["merge", "-", "-", "-", "-", "-"]
    assert "about 28 s left in these stages, 1 not begun" in "\n".join(lines)
    assert row(lines, "worker-0") == ["worker-0", "-", "-", "layers", "0-3", "calibrate", "tokens-2", "10", "s"]
    assert row(lines, "worker-1")[:-2] == ["worker-1", "node-7", "2.1", "GB", "layers", "0-3", "calibrate", "tokens-3"]
    assert lines[-1] == "1 tasks on CPUs run or wait for one"
    crowd = [given(1000, f"tokens-{number}", f"worker-{number}") for number in range(30)]
    crowded = drawn(progress_of(*begun(30, {}), *crowd), 1001, height=24)
    assert len(crowded) <= 24 and "more workers; 0 tasks" in crowded[-1]
    assert all(len(line) <= 80 for line in drawn(progress, 1010, width=80))


def test_a_lost_unit_takes_its_worker_off_the_screen_and_a_run_that_begins_again_starts_from_nothing() -> None:
    progress = progress_of(*begun(8, {"tokens-#": 8}), given(1000, "tokens-1", "worker-0"), ended(1002, "tokens-1", 2, LOST))
    assert not progress.workers and progress.num_retried == 1
    progress.note(ended(1003, "tokens-2", 2, FAILED))
    assert progress.num_failed == 1 and progress.stages["calibrate"].num_done == 0
    progress.note(Event(time=2000, event=RUN_ENDS))
    assert "the run has ended; 1 units failed; 1 units tried again" in "\n".join(drawn(progress, 2000))
    progress.note(Event(time=3000, event=RUN_BEGINS, stages=STAGES))
    assert (progress.num_retried, progress.is_over, progress.stages["calibrate"].num_units) == (0, False, None)


def many(num_units: int, seconds: float) -> Iterator[Event]:
    """Units that end evenly over some seconds, half of them on a worker."""
    for number in range(num_units):
        at, name = 1000 + seconds * (number + 1) / num_units, f"tokens-{number:04d}"
        yield given(at - 0.001, name, "worker-0" if number % 2 else "")
        yield ended(at, name, 0.001)


def test_nothing_moves_when_400_units_end_in_a_second() -> None:
    """Every frame has the same lines, its columns in the same places; and frames come four a second, whatever ends."""
    progress = progress_of(*begun(400, {"tokens-#": 400}), given(1000, "tokens-9999", "worker-0"))
    frames = []
    for number, event in enumerate(many(400, 1.0)):
        progress.note(event)
        if number % 40 == 39:
            frames.append(drawn(progress, event.time))
    assert len(frames) == 20 and len({len(frame) for frame in frames}) == 1
    assert len({frame[2].index("/400") for frame in frames}) == 1
    assert len({len(frame[2].rstrip()) for frame in frames}) == 1
    out = io.StringIO()
    reporter = Reporter(Console(file=out, force_terminal=True, width=120, height=40))
    began = time.monotonic()
    for event in [*begun(400, {"tokens-#": 400}), *many(400, 1.0)]:
        reporter.note(event)
    reporter.end_all()
    num_frames = out.getvalue().count("prepare")
    assert num_frames <= 3 + 4 * (time.monotonic() - began)


def test_without_a_terminal_there_is_at_most_a_line_in_five_seconds_beside_ends_of_stages() -> None:
    out, now = io.StringIO(), [1000.0]
    reporter = Reporter(Console(file=out, width=200), clock=lambda: now[0])
    for event in [*begun(400, {"tokens-#": 400}), *many(400, 22.0)]:
        now[0] = event.time
        reporter.note(event)
    reporter.end("calibrate")
    lines = out.getvalue().splitlines()
    assert lines[0] == "calibrate: 0 of 400 units"
    assert re.fullmatch(r"calibrate: 91 of 400 units, 14\d,\d{3} tokens/s, 7\d\.\d{3} GB/s, about 0 s left", lines[1]), lines[1]
    assert len(lines) == 1 + int(22 / QUIET_S) + 1 and lines[-1] == "calibrate: 400 units in 21.9 s"


def test_durations_are_short() -> None:
    assert [duration_text(seconds) for seconds in (0.4, 99, 100, 5940, 11_100)] == [
        "0 s",
        "99 s",
        "2 min",
        "99 min",
        "3 h 05 min",
    ]
    assert stage_line(progress_of(*begun(2, {})).stages["calibrate"], 1000) == "calibrate: 0 of 2 units"


def test_a_log_is_followed_while_it_grows(tmp_path: Path) -> None:
    follower, path = Follower(tmp_path), tmp_path / EVENTS_FILE
    assert follower.new_events() == []
    lines = [event.model_dump_json(exclude_defaults=True) + "\n" for event in begun(8, {"a": 8})]
    path.write_text(lines[0] + "no event\n" + lines[1][:20])
    assert [event.event for event in follower.new_events()] == [RUN_BEGINS]
    path.write_text(lines[0] + "no event\n" + lines[1] + lines[2])
    assert [event.stage for event in follower.new_events()] == ["prepare", "calibrate"]
    assert follower.new_events() == []
    path.write_text(lines[0])
    assert [event.event for event in follower.new_events()] == [RUN_BEGINS], "another log"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_watch_shows_a_run_until_its_log_says_that_it_has_ended(
    tmp_path: Path, finished_run: Callable[[str], FinishedRun], is_terminal: bool
) -> None:
    done = finished_run("mixtral")
    lines = (done.run_dir / EVENTS_FILE).read_text().splitlines(keepends=True)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "run.json").write_text((done.run_dir / "run.json").read_text())
    shown = iter([lines[: len(lines) // 2], lines[len(lines) // 2 :]])

    def grow(_seconds: float) -> None:
        with open(run_dir / EVENTS_FILE, "a") as log:
            log.writelines(next(shown))

    out = io.StringIO()
    watch(run_dir, Console(file=out, force_terminal=is_terminal, width=200, height=40), sleep=grow)
    text = out.getvalue()
    assert "the run has ended" in text and f"{run_dir}: no driver is running" in text
    if is_terminal:
        assert text.count("calibrate") >= 3 and "local" in text
    else:
        assert re.search(r"^calibrate: \d+ of \d+ units", text, re.MULTILINE) or "units" in text


def in_terminal(command: list[str], width: int = 100, height: int = 40) -> str:
    """What a command writes into a terminal of its own."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "COLUMNS": str(width), "LINES": str(height), "TERM": "xterm-256color", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    pieces: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                return
            if not piece:
                return
            pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert process.wait(300) == 0, b"".join(pieces).decode(errors="replace")[-3000:]
    finally:
        process.kill()
        reader.join(10)
        os.close(ours)
    return b"".join(pieces).decode()


def test_the_example_runs_and_is_watched_in_a_terminal(tmp_path: Path) -> None:
    small = {
        "run_dir": tmp_path / "run", "calibration.num_sequences": 4, "calibration.sequence_length": 64,
        "clustering.num_experts": "[4]", "export.formats": "[stock]", "evaluation": "null",
    }  # fmt: skip
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "pipeline"]
    text = in_terminal([*command, "run", "examples/tiny-mixtral.yaml", "--executor", "local", *settings])
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    last = plain[plain.rindex("stage ") :]
    for stage in ("prepare", "calibrate", "cluster", "merge", "assemble", "report"):
        (line,) = [line.strip() for line in last.splitlines() if re.match(rf"{stage} .* \d+/\d+ ", line)]
        assert line.endswith("done"), last
    assert re.search(r"local +\S+ +\d+\.\d [MG]B", last), last
    assert "the run has ended" in last and "units run, 0 reused" in last
    begins = json.loads((tmp_path / "run" / EVENTS_FILE).read_text().splitlines()[0])
    assert begins["command"].startswith("hcsmoe run examples/tiny-mixtral.yaml --executor local --set ")
    watched = in_terminal([*command, "status", str(tmp_path / "run"), "--watch"])
    assert "the run has ended" in watched and "calibrate" in watched


def test_watch_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run directory: it has no run\.json"):
        watch(tmp_path, Console(file=io.StringIO()))
