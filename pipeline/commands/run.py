"""Runs one run file, or a batch of them: checks the input, takes the locks, drives the units, publishes the results."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from pipeline import checks
from pipeline.display.progress import Reporter
from pipeline.driver.loop import Driver
from pipeline.driver.run_state import RunOptions, RunResult, RunState
from pipeline.errors import LockLost
from pipeline.executors.base import Executor
from pipeline.state.lock import RunLock
from stages.contracts.errors import InputError
from stages.contracts.settings import RunConfig

MakeExecutor = Callable[[], Executor]


def run(config: RunConfig, make_executor: MakeExecutor, reporter: Reporter, options: RunOptions) -> RunResult:
    """Run every stage that is not sealed yet.

    Raises InputError for bad input; problems that are visible in config, headers and files are raised before any unit starts.
    Raises RunFailed when units fail; units sealed by then are kept.
    """
    state = RunState(checks.check(config), reporter, options)
    run_all([state], make_executor, reporter)
    return state.result()


def run_all(states: Sequence[RunState], make_executor: MakeExecutor, reporter: Reporter) -> None:
    """Run all checked runs on one executor. Each run holds the lock of its run directory."""
    with ExitStack() as connection, ExitStack() as stack:
        lock_checks: dict[Path, Callable[[], None]] = {}
        for state in states:
            if warning := transient_run_dir(state.run_dir):
                reporter.line(warning)
            try:
                lock = stack.enter_context(RunLock(state.run_dir))
            except InputError as e:
                state.refuse(e)
                continue
            lock_checks[state.run_dir] = lock.check
            if lock.took_over:
                reporter.line(f"took over the stale lock of {lock.took_over}")
        active = [state for state in states if state.is_active]
        if not active:
            return
        executor = make_executor()
        connection.callback(executor.disconnect)
        stack.callback(executor.close)
        reporter.line(executor.describe())
        for state in active:
            try:
                state.begin(executor.num_workers, lock_checks[state.run_dir])
            except LockLost as e:
                state.lose(e)
            else:
                stack.callback(state.close)
        try:
            Driver(active, executor, reporter.line).drive()
        except KeyboardInterrupt:  # print this at once: ending the worker processes takes a while
            reporter.line("interrupted; what was finished is kept, and the same command continues from there")
            raise


def transient_run_dir(run_dir: Path) -> str | None:
    """A warning if a run directory lies in Ray's temporary copy of `--working-dir`, else None."""
    if ("runtime_resources", "working_dir_files") not in pairwise(run_dir.parts):
        return None
    return (
        f"warning: run_dir is {run_dir}, in Ray's temporary copy of the job's working directory: results are lost with it and "
        f"other nodes cannot reach them; use --set run_dir=/shared/... on storage that every node reaches"
    )
