"""Start and end of a process of this package: settings that must precede the import of torch, and an exit that does not wait
for torch to shut down.

Nothing here imports a module that is slow to import.
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
"""Environment of a process that computes. The first variable makes idle threads sleep: spinning threads would take the
processor from working threads. The others limit the caches of compiled kernels in oneDNN and in torch's layer above it. Each
cache would keep 1,024 kernels, and evaluate needs a new one for every number of rows routed to an expert: up to gigabytes for
large experts."""


def prepare_to_compute() -> None:
    """Set the variables of COMPUTING that the user has not set.
    Call it before torch is imported: libraries read them on loading."""
    for name, value in COMPUTING.items():
        os.environ.setdefault(name, value)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause garbage collection. While modules are imported it scans more and more objects and frees none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """Run a program and end the process with its exit code, without the second that Python takes to unload torch.

    Exit hooks run (temporary folders, logging, Ray), and all output is flushed. If a thread still runs, or output cannot be
    written, the process ends by Python's normal exit.
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
