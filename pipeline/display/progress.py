"""What a person sees while a run goes on: one bar a stage in a terminal, plain lines elsewhere."""

import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.display.printing import printable, printable_lines, show
from pipeline.driver.units import Outcome, Unit, costs


class Reporter:
    """Writes to standard error, so that standard output holds results only."""

    def __init__(self, console: Console, prefix: str = "") -> None:
        """prefix: of every line, for one of several runs; there are no bars then."""
        self.console, self._prefix = console, prefix
        self.log: logging.LoggerAdapter[logging.Logger] | None = None
        """Where lines and units go as well, once the run directory is this driver's."""
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._stage, self._num_units, self._num_done = "", 0, 0
        self._started = 0.0

    def begin(self, stage: str, num_units: int, num_reused: int) -> None:
        """A stage begins: units to run, and units that an earlier run has sealed."""
        self._stage, self._num_units, self._num_done, self._started = stage, num_units, 0, time.monotonic()
        reused = f", {num_reused} reused" if num_reused else ""
        if self.console.is_terminal and not self._prefix:
            self._bars = Progress(
                TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[unit]}", markup=False), console=self.console,
            )  # fmt: skip
            self._bar = self._bars.add_task(stage, total=num_units, unit=reused.lstrip(", "))
            self._bars.start()
        else:
            self.line(f"{stage}: {num_units} units{reused}")

    def done(self, unit: Unit, outcome: Outcome) -> None:
        """A unit is sealed."""
        self._num_done += 1
        line = f"{unit.stage} {unit.label}: {costs(outcome)} on {outcome.host} ({self._num_done}/{self._num_units})"
        if self._bars is None or self._bar is None:
            self.line(line)
            return
        self._bars.update(self._bar, advance=1, unit=printable(unit.label))
        if self.log is not None:
            self.log.info("%s", printable(line))

    def end(self) -> None:
        """The stage is over."""
        if self._bars is not None and self._bar is not None:
            if self._num_units:
                self._bars.update(self._bar, unit="")
            self._bars.stop()
            self._bars = None
        elif self._num_units:
            self.line(f"{self._stage}: {self._num_done} units in {time.monotonic() - self._started:.1f} s")
        self._num_units = 0

    def line(self, text: str) -> None:
        """A message for a log; lines after its first are indented."""
        if self.log is not None:
            self.log.info("%s", printable_lines(text))
        show(self.console, self._prefix + text)
