"""A task that raises fails alone: its error becomes a fact, and the run goes on with the other tasks."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stages.contracts.errors import InputError
from stages.contracts.units import UnitResult
from stages.io.files import write_bytes
from stages.io.storage import is_outside, is_passing

_MAX_REASON = 400

F = TypeVar("F")


def attempted(
    part_dir: Path, act: Callable[[], UnitResult[F]], failed: Callable[[str], F], name: str = "failure"
) -> UnitResult[F]:
    """The result of `act`; if it raises, facts with the reason, and the traceback in a text file of that name.

    Raised on are errors that are not the task's: bad input, lack of memory, and what a file server or the machine does.
    """
    try:
        return act()
    except (InputError, MemoryError):
        raise
    except Exception as e:  # a task's code and metrics may raise anything
        if is_passing(e) or is_outside(e) or type(e).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        written = write_bytes(part_dir / f"{name}.txt", traceback.format_exc().encode())
        return UnitResult(failed(reason[:_MAX_REASON]), (written,))
