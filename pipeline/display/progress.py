"""What a run tells while it works: one screen in a terminal, plain lines elsewhere."""

import logging
import threading
import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live

from pipeline.display.printing import printable_lines, show
from pipeline.display.screen import FRAMES_PER_S, screen, stage_line
from pipeline.driver.outcome import Outcome, costs
from pipeline.state.progress import RunProgress
from stages.contracts.events import SEALED, STAGE_BEGINS, Event
from stages.contracts.units import Unit

QUIET_S = 5.0
"""Least time between two lines on how far a stage is, where there is no terminal."""


class Reporter:
    """Writes to standard error, so that standard output holds results only."""

    def __init__(self, console: Console, prefix: str = "", clock: Callable[[], float] = time.time) -> None:
        """prefix: put before every line, to tell several runs apart. With a prefix there is no screen. clock: seconds since
        1970."""
        self.console, self._prefix, self._clock = console, prefix, clock
        self.log: logging.LoggerAdapter[logging.Logger] | None = None
        """Log file that also receives lines and sealed units. Set once this driver holds the lock of the run directory."""
        self._has_screen = console.is_terminal and not prefix
        self._live: Live | None = None
        self.progress = RunProgress()
        """How far the run is, by the events noted so far."""
        self._lock = threading.Lock()
        """The screen is drawn by a thread of its own."""
        self._told_at = 0.0

    def note(self, event: Event) -> None:
        """An event of the run, as it is logged."""
        with self._lock:
            self.progress.note(event)
        if not self._has_screen:
            self._tell(event)
        elif self._live is None:
            self._live = Live(console=self.console, refresh_per_second=FRAMES_PER_S, get_renderable=self._screen)
            self._live.start()

    def _tell(self, event: Event) -> None:
        """Print how far a stage is, unless a line has said so of late."""
        if event.event not in (STAGE_BEGINS, SEALED) or not self.progress.stages[event.stage].num_units:
            return
        if self._clock() - self._told_at >= QUIET_S:
            self._told_at = self._clock()
            show(self.console, self._prefix + stage_line(self.progress.stages[event.stage], self._told_at))

    def _screen(self) -> RenderableType:
        with self._lock:
            return screen(self.progress, self._clock(), self.console.height)

    def done(self, unit: Unit, outcome: Outcome) -> None:
        """A unit is sealed. Called before the event that says so is noted."""
        stage = self.progress.stages[unit.stage]
        self._log(f"{unit.stage} {unit.label}: {costs(outcome)} on {outcome.host} ({stage.num_done + 1}/{stage.num_units})")

    def end(self, stage: str) -> None:
        """A stage has finished."""
        ended = self.progress.stages[stage]
        if ended.num_units:
            line = f"{stage}: {ended.num_done} units in {ended.elapsed_s(self._clock()):.1f} s"
            if self._has_screen:
                self._log(line)
            else:
                self.line(line)

    def end_all(self) -> None:
        """The run has ended, with success or not."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        """Print a message. Its lines after the first are indented."""
        self._log(text)
        show(self.console, self._prefix + text)

    def _log(self, text: str) -> None:
        if self.log is not None:
            self.log.info("%s", printable_lines(text))
