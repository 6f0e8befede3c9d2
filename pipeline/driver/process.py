"""How a process of this package begins and ends: what is set before torch loads, and an end that waits for nothing.

Nothing here imports what is slow to import.
"""

import atexit
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

COMPUTING = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}
"""Environment of a process that computes. The first: threads that have nothing to do sleep instead of spinning, which would
take the processor from whoever works. The others: kernels that oneDNN, and torch's layer above it, keep. Both would keep 1,024,
a new one for every number of rows that an expert is routed in evaluate: up to gigabytes for large experts."""


def prepare_to_compute() -> None:
    """Set COMPUTING where the user has not set it. Libraries read it while they load, so this comes before torch."""
    for name, value in COMPUTING.items():
        os.environ.setdefault(name, value)


@contextmanager
def collection_paused() -> Iterator[None]:
    """No garbage collection: while modules are imported it looks at more and more objects, and frees none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """Run a program and end the process with its exit code, without the second that Python takes to dismantle torch.

    Exit hooks run (temporary folders, logging, Ray), and all output is flushed. Where a thread still runs, or output cannot be
    written, the process ends as Python ends it.
    """
    try:
        main()
        code = 0
    except SystemExit as e:
        if not isinstance(e.code, int | None):
            raise
        code = e.code or 0
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)
    os._exit(code)
