"""Progress of a run in a notebook: one bar for each stage, in a single output that is redrawn. And the choice of a reporter."""

import html
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from pipeline.display.printing import printable
from pipeline.display.progress import Reporter
from stages.contracts.events import Event

_REDRAW_S = 0.25


class NotebookReporter(Reporter):
    """Shows bars, and below them the last line that the run has told. All lines go to the log file, too."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self._last_line = ""
        self._output: Any = None
        self._drawn_at = 0.0

    def note(self, event: Event) -> None:
        """An event of the run, as it is logged."""
        super().note(event)
        self._draw()

    def end(self, stage: str) -> None:
        """A stage has finished."""
        super().end(stage)
        self._draw(is_due=True)

    def line(self, text: str) -> None:
        """Tell a message. It is shown unless another follows within _REDRAW_S."""
        super().line(text)
        self._last_line = text
        self._draw()

    def _draw(self, is_due: bool = False) -> None:
        now = time.monotonic()
        if not is_due and now - self._drawn_at < _REDRAW_S:
            return
        from IPython.display import HTML, display

        self._drawn_at = now
        if self._output is None:
            self._output = display(HTML(self.page), display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._output.update(HTML(self.page))  # type: ignore[no-untyped-call]

    @property
    def page(self) -> str:
        """The bars as HTML."""
        rows = "".join(
            f"<tr><td>{html.escape(printable(stage.name))}</td>"
            f"<td><progress value='{stage.num_done}' max='{stage.num_units}'></progress></td>"
            f"<td>{stage.num_done}/{stage.num_units}{f', {stage.num_reused} reused' if stage.num_reused else ''}</td>"
            f"<td>{'' if stage.ended is None else f'{stage.elapsed_s(stage.ended):.1f} s'}</td></tr>"
            for stage in self.progress.stages.values()
            if stage.num_units
        )
        return f"<table>{rows}</table><pre>{html.escape(printable(self._last_line))}</pre>"


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


@contextmanager
def reporter_here(is_shown: bool) -> Iterator[Reporter]:
    """The reporter that suits this process: bars in a notebook or terminal, else lines on standard error; or none of these."""
    if is_shown and is_notebook():
        yield NotebookReporter()
    else:
        yield Reporter(Console(stderr=True, quiet=not is_shown))
