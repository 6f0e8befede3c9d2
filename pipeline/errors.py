"""Errors of a run as a whole, and the exit codes of the command line."""

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
EXIT_CODES = {
    DONE: "done",
    FAILED: "the run, or a run of the batch, failed",
    BAD_INPUT: "bad input",
    INTERRUPTED: "interrupted, by Ctrl-C or SIGTERM",
}
"""What each exit code of the command line says."""


class RunFailed(Exception):
    """Units failed; the message lists each with its cause."""


class LockLost(RunFailed):
    """Another driver has, or may have, taken over the run directory. This driver writes nothing more to it."""
