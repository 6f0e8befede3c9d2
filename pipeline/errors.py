"""Errors of a run as a whole."""


class RunFailed(Exception):
    """Units failed; the message lists each with its cause."""
