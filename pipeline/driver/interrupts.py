"""Ctrl-C and SIGTERM, neither of which may be lost.

A signal raises KeyboardInterrupt wherever the main thread is. There the exception can get lost: some libraries catch everything
while they are imported, and Python drops what is raised in a destructor. So the driver asks between units as well.
"""

import signal
from types import FrameType
from typing import NoReturn

_received: list[str] = []
"""Names of the signals that this process has received since `watch_signals`."""


def watch_signals() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, and note them. Signals from before are forgotten."""
    _received.clear()
    handle_signals()


def handle_signals() -> None:
    """Install the handlers of `watch_signals`, for example after a library has installed its own.

    A SIGINT that this process was started to ignore stays ignored: nohup and shells' background jobs count on it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)


def check_signals() -> None:
    """Raise KeyboardInterrupt if a signal has come since `watch_signals`."""
    if _received:
        raise KeyboardInterrupt(_received[0])


def _interrupt(signum: int, _frame: FrameType | None) -> NoReturn:
    _received.append(signal.Signals(signum).name)
    raise KeyboardInterrupt(_received[-1])
