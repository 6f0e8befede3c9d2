"""One screen that shows how far a run is: stages, rates, time left, workers.

Every stage and every number has its place from the start, so that nothing moves when many units end at once.
"""

import re

from rich import filesize
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.display.printing import printable
from pipeline.state.progress import RunProgress, StageProgress, WorkerProgress

FRAMES_PER_S = 4
_MAX_WORKERS = 16
_NONE = "-"


def duration_text(seconds: float) -> str:
    """`4 s`, `12 min`, `3 h 05 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def rate_texts(stage: StageProgress, now: float) -> tuple[str, str]:
    """Tokens a second and gigabytes a second, on average over the stage so far."""
    tokens, num_bytes = stage.rate(stage.num_tokens, now), stage.rate(stage.num_bytes, now)
    return _NONE if tokens is None else f"{tokens:,.0f}", _NONE if num_bytes is None else f"{num_bytes / 1e9:.3f}"


def stage_line(stage: StageProgress, now: float) -> str:
    """A line for a log: `calibrate: 12 of 40 units, 1,234 tokens/s, 0.310 GB/s, about 3 min left`."""
    tokens, num_bytes = rate_texts(stage, now)
    left_s = stage.left_s(now)
    parts = [
        f"{stage.num_done} of {stage.num_units} units",
        *([] if tokens == _NONE else [f"{tokens} tokens/s"]),
        *([] if num_bytes == _NONE else [f"{num_bytes} GB/s"]),
        *([] if left_s is None else [f"about {duration_text(left_s)} left"]),
    ]
    return f"{stage.name}: {', '.join(parts)}"


def screen(progress: RunProgress, now: float, height: int = 50, head: str = "") -> RenderableType:
    """The screen at a time, in seconds since 1970. height: lines of the terminal, which limit the workers that are shown. head:
    a line above."""
    parts: list[RenderableType] = [Text(printable(head), no_wrap=True, overflow="ellipsis")] if head else []
    parts += [_stages(progress, now), Text(_summary(progress, now), no_wrap=True, overflow="ellipsis")]
    room = max(1, min(_MAX_WORKERS, height - len(progress.stages) - len(parts) - 7))
    return Group(*parts, _workers(progress, now, room), Text(_others(progress, room), no_wrap=True, overflow="ellipsis"))


def _stages(progress: RunProgress, now: float) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("stage", width=10, no_wrap=True)
    table.add_column("", width=12)
    table.add_column("done", width=13, justify="right", no_wrap=True)
    table.add_column("tokens/s", width=9, justify="right", no_wrap=True)
    table.add_column("GB/s", width=7, justify="right", no_wrap=True)
    table.add_column("time", width=11, justify="right", no_wrap=True)
    table.add_column("left", width=11, justify="right", no_wrap=True)
    for stage in progress.stages.values():
        table.add_row(Text(printable(stage.name), overflow="ellipsis"), _bar(stage), *_numbers(stage, now))
    return table


def _bar(stage: StageProgress) -> RenderableType:
    """Share of the units that are sealed, those of earlier runs included."""
    if stage.num_units is None:
        return Text("")
    total = stage.num_units + stage.num_reused
    done = stage.num_done + stage.num_reused
    return ProgressBar(total=max(1, total), completed=done if total else 1, width=12)


def _numbers(stage: StageProgress, now: float) -> tuple[str, ...]:
    if stage.num_units is None:
        return (_NONE,) * 5
    total = stage.num_units + stage.num_reused
    left_s = stage.left_s(now)
    left = "done" if left_s == 0 else "?" if left_s is None else duration_text(left_s)
    time = duration_text(stage.elapsed_s(now)) if stage.began is not None else _NONE
    return f"{stage.num_done + stage.num_reused}/{total}", *rate_texts(stage, now), time, left


def _summary(progress: RunProgress, now: float) -> str:
    left_s = progress.left_s(now)
    left = "time left is not known yet" if left_s is None else f"about {duration_text(left_s)} left in these stages"
    if progress.num_unlisted:
        left += f", {progress.num_unlisted} not begun"
    if progress.is_over:
        left = f"the run has ended; {progress.num_failed} units failed" if progress.num_failed else "the run has ended"
    began = duration_text(now - progress.began) if progress.began is not None and not progress.is_over else ""
    retried = f"; {progress.num_retried} units tried again" if progress.num_retried else ""
    return f"{began + ' so far; ' if began else ''}{left}{retried}"


def _workers(progress: RunProgress, now: float, room: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("worker", width=10, no_wrap=True)
    table.add_column("node", width=14, no_wrap=True)
    table.add_column("memory", width=9, justify="right", no_wrap=True)
    table.add_column("layer shard", width=20, no_wrap=True)
    table.add_column("unit", ratio=1, min_width=12, no_wrap=True)
    table.add_column("for", width=7, justify="right", no_wrap=True)
    workers = sorted(progress.workers.values(), key=lambda worker: (len(worker.name), worker.name))
    for worker in workers[:room]:
        table.add_row(*(Text(printable(text), overflow="ellipsis") for text in _cells(worker, now)))
    return table


def _others(progress: RunProgress, room: int) -> str:
    """What runs beside the workers that are shown."""
    num_more = len(progress.workers) - room
    more = f"{num_more} more workers; " if num_more > 0 else ""
    return f"{more}{len(progress.tasks)} tasks on CPUs run or wait for one"


def _layers(hold: str) -> str:
    """The layers that are named at the end of what a worker holds; all of it where none are."""
    found = re.search(r"\blayers? .*", hold)
    return found[0] if found else hold


def _cells(worker: WorkerProgress, now: float) -> tuple[str, ...]:
    memory = worker.gpu_peak_bytes or worker.peak_bytes
    return (
        worker.name,
        worker.host or _NONE,
        filesize.decimal(memory) if memory else _NONE,
        _layers(worker.hold) or _NONE,
        f"{worker.stage} {worker.unit.partition('/')[2]}" if worker.unit else "idle",
        duration_text(max(0.0, now - worker.since)),
    )
