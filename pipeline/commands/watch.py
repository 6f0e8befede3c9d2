"""`status --watch`: how far a run is, from its files alone, until it ends."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from pipeline.display.printing import show
from pipeline.display.progress import QUIET_S
from pipeline.display.screen import screen, stage_line
from pipeline.run.record import read_record
from pipeline.state.events import Follower
from pipeline.state.lock import describe_holder
from pipeline.state.progress import RunProgress
from stages.io.storage import absolute, is_remote

_LOOK_S = 0.5


def watch(run_dir: str | Path, console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show a run until its log says that it has ended: one screen in a terminal, a line every few seconds elsewhere.

    A run whose driver has died does not end: the line about the driver says that it is gone, and the next run shows here.
    Raises InputError where there was no run.
    """
    folder = absolute(run_dir)
    read_record(folder)
    follower, progress = Follower(folder), RunProgress()
    look_s = QUIET_S if is_remote(folder) or not console.is_terminal else _LOOK_S
    with Live(console=console, auto_refresh=False) as live:
        while True:
            for event in follower.new_events():
                progress.note(event)
            holder = describe_holder(folder)
            if console.is_terminal:
                live.update(screen(progress, time.time(), console.height, holder), refresh=True)
            else:
                show(console, _line(progress, holder))
            if progress.is_over:
                return
            sleep(look_s)


def _line(progress: RunProgress, holder: str) -> str:
    """Stages that have begun and not ended; the driver, where there are none."""
    now = time.time()
    open_stages = [stage for stage in progress.stages.values() if stage.num_units and stage.num_done < stage.num_units]
    if progress.is_over:
        return "the run has ended"
    return "; ".join(stage_line(stage, now) for stage in open_stages) or holder
