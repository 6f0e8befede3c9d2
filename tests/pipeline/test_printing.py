"""What is printed is what stands there: no name moves the cursor, colours a line or forges another message."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

from pipeline.cli import main
from pipeline.display.printing import add_row, printable, printable_lines, show
from pipeline.display.progress import Reporter
from pipeline.driver.outcome import Outcome
from stages.contracts.errors import InputError
from stages.contracts.events import SEALED, STAGE_BEGINS, STARTED, Event
from tests.pipeline.fake import unit

HOSTILE = {
    "\x1b[2Jgone": r"\x1b[2Jgone",
    "a\rerror: b": r"a\rerror: b",
    "a\x07\x00\x7f\x9b": r"a\x07\x00\x7f\x9b",
    "abc\u202egpj.exe": r"abc\u202egpj.exe",
    "a\u2028b\x85c\td": r"a\u2028b\x85c\td",
    "\ud800": r"\ud800",
    "[red]x[/red] [/] :bomb:": "[red]x[/red] [/] :bomb:",
    "Müller 模型 a\u00a0b": "Müller 模型 a\u00a0b",
}


def written(item: object, width: int = 200) -> str:
    out = io.StringIO()
    show(Console(file=out, width=width, force_terminal=False), item)
    return out.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_not_to_be_seen_is_escaped_and_markup_is_text(text: str) -> None:
    assert printable(text) == HOSTILE[text]
    assert written(text) == f"{HOSTILE[text]}\n"
    table = Table("name")
    add_row(table, [text])
    assert f" {HOSTILE[text]} " in written(table)
    report = io.StringIO()
    Reporter(Console(file=report)).line(text)
    assert report.getvalue() == f"{HOSTILE[text]}\n"


def test_a_line_break_in_a_name_makes_no_second_message() -> None:
    assert printable("x\nerror: y") == r"x\nerror: y"
    assert printable_lines("x\nerror: y\n\r\nfailed: z") == "x\n  error: y\n  \\r\n  failed: z"
    assert written("error: tensor x\nerror: disk is full; rm -rf /").splitlines() == [
        "error: tensor x", "  error: disk is full; rm -rf /",
    ]  # fmt: skip
    table = Table("name")
    add_row(table, ["x\nerror: y"])
    assert r" x\nerror: y " in written(table)


def test_a_long_line_is_not_cut() -> None:
    assert written("x" * 500, width=80) == "x" * 500 + "\n"


def test_the_name_of_a_unit_is_escaped_in_lines_and_bars() -> None:
    for is_terminal in (False, True):
        out = io.StringIO()
        reporter = Reporter(Console(file=out, force_terminal=is_terminal, width=120))
        reporter.note(Event(time=1, event=STAGE_BEGINS, stage="toy", num_units=2))
        path = "toy-0/[bold]a\x07b[/bold]"
        for worker in ("", "w\x07"):
            reporter.note(Event(time=1, event=STARTED, stage="toy", unit=path, worker=worker, hold="[red]\x07"))
        if is_terminal:
            reporter.line("seen")
        reporter.done(unit("x", label="[bold]a\x07b[/bold]"), Outcome("host\x07", 1.0, {}))
        reporter.note(Event(time=2, event=SEALED, stage="toy", unit=path, host="host\x07"))
        reporter.end("toy")
        reporter.end_all()
        assert "\x07" not in out.getvalue()
        if is_terminal:
            assert r"host\x07" in out.getvalue() and r"[red]\x07" in out.getvalue()


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (InputError("tensor a\nerror: b\x1b[0m"), 2, "error: tensor a\n  error: b\\x1b[0m\n"),
        (
            PermissionError(13, "Permission denied", "/x\ny"),
            1,
            "failed: [Errno 13] Permission denied: '/x\\ny'; what was finished is kept: mend this and the same command "
            "continues from there\n",
        ),
        (
            OSError(28, "No space left on device", "/run/a"),
            1,
            "failed: [Errno 28] No space left on device: '/run/a'; what was finished is kept: mend this and the same command "
            "continues from there\n",
        ),
    ],
)
def test_an_error_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int, says: str
) -> None:
    monkeypatch.setattr("pipeline.cli.app", raising(error))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == code
    assert capsys.readouterr().err == says


@pytest.mark.parametrize(
    "error",
    [
        OSError("ours"),
        OSError(9, "Bad file descriptor"),
        OSError(22, "Invalid argument", "x"),
        ConnectionResetError(104, "reset"),
    ],
)
def test_an_os_error_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    monkeypatch.setattr("pipeline.cli.app", raising(error))
    with pytest.raises(OSError) as raised:
        main()
    assert raised.value is error


def raising(error: Exception) -> Callable[[], None]:
    def app() -> None:
        raise error

    return app
