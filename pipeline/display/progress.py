"""Progress display of a run: one bar per stage in a terminal, plain lines elsewhere."""

import logging
import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from pipeline.display.printing import printable, printable_lines, show
from pipeline.driver.outcome import Outcome, costs
from stages.contracts.units import Unit


@dataclass
class _Stage:
    """Progress of one stage. bar: the stage's progress bar in a terminal."""

    num_units: int
    started: float
    bar: TaskID | None = None
    num_done: int = 0


class Reporter:
    """Writes to standard error, so that standard output holds results only."""

    def __init__(self, console: Console, prefix: str = "") -> None:
        """prefix: put before every line, to tell several runs apart. With a prefix no bars are drawn."""
        self.console, self._prefix = console, prefix
        self.log: logging.LoggerAdapter[logging.Logger] | None = None
        """Log file that also receives lines and sealed units. Set once this driver holds the lock of the run directory."""
        self._bars: Progress | None = None
        self._stages: dict[str, _Stage] = {}

    def begin(self, stage: str, num_units: int, num_reused: int) -> None:
        """A stage begins. num_units: units to run. num_reused: units that an earlier run has sealed."""
        self._stages[stage] = _Stage(num_units, time.monotonic())
        reused = f", {num_reused} reused" if num_reused else ""
        if not self.console.is_terminal or self._prefix:
            self.line(f"{stage}: {num_units} units{reused}")
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("{task.fields[unit]}", markup=False), console=self.console,
            )  # fmt: skip
            self._bars.start()
        self._stages[stage].bar = self._bars.add_task(stage, total=num_units, unit=reused.lstrip(", "))

    def done(self, unit: Unit, outcome: Outcome) -> None:
        """A unit is sealed."""
        stage = self._stages[unit.stage]
        stage.num_done += 1
        line = f"{unit.stage} {unit.label}: {costs(outcome)} on {outcome.host} ({stage.num_done}/{stage.num_units})"
        if self._bars is None or stage.bar is None:
            self.line(line)
            return
        self._bars.update(stage.bar, advance=1, unit=printable(unit.label))
        if self.log is not None:
            self.log.info("%s", printable(line))

    def end(self, stage: str) -> None:
        """A stage has finished."""
        ended = self._stages.pop(stage)
        if self._bars is None or ended.bar is None:
            if ended.num_units:
                self.line(f"{stage}: {ended.num_done} units in {time.monotonic() - ended.started:.1f} s")
            return
        if ended.num_units:
            self._bars.update(ended.bar, unit="")
        if not self._stages:
            self._bars.stop()
            self._bars = None

    def end_all(self) -> None:
        """The run has ended, with success or not."""
        for stage in list(self._stages):
            self.end(stage)

    def line(self, text: str) -> None:
        """Print a message. Its lines after the first are indented."""
        if self.log is not None:
            self.log.info("%s", printable_lines(text))
        show(self.console, self._prefix + text)
