"""Errors of a run as a whole."""


class RunFailed(Exception):
    """Units failed; the message lists each with its cause."""


class LockLost(RunFailed):
    """The run directory belongs to another driver by now, or may do so: this one writes nothing more to it."""
