"""Retries of operations that a file server or a store did not answer, and the pauses between them."""

import time
from collections.abc import Callable
from typing import TypeVar

from stages.io.storage import failures, is_passing

_FIRST_PAUSE_S, _FACTOR, _MAX_PAUSE_S = 5.0, 6.0, 300.0

T = TypeVar("T")


def pause_s(num_failed: int) -> float:
    """Seconds to wait after a number of failed attempts: 5 s, 30 s, 180 s, then five minutes each."""
    return min(_MAX_PAUSE_S, _FIRST_PAUSE_S * _FACTOR ** (num_failed - 1))


def how_again(num_failed: int, max_attempts: int) -> str:
    """For the log: when the next attempt is, and its number."""
    return f"in {pause_s(num_failed):.0f} s ({num_failed + 1} of {max_attempts})"


def persist(act: Callable[[], T], max_attempts: int, say: Callable[[str], None]) -> T:
    """Return the result of `act`. It is called again after a pause if its error may pass, so it must be safe to repeat."""
    for num_failed in range(1, max_attempts):
        try:
            return act()
        except failures() as e:
            if not is_passing(e):
                raise
            say(f"{type(e).__name__}: {e}; trying again {how_again(num_failed, max_attempts)}")
            time.sleep(pause_s(num_failed))
    return act()
