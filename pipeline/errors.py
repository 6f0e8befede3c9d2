"""Errors of a run as a whole."""


class RunFailed(Exception):
    """Units failed; the message lists each with its cause."""


class LockLost(RunFailed):
    """Another driver has, or may have, taken over the run directory. This driver writes nothing more to it."""
