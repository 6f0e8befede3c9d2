"""The error that a user can correct."""


class InputError(ValueError):
    """The user's input is wrong. The message names the place, the value, the bound and the remedy.

    Any other exception is a bug of this program or a fault of the machine and is reported with its traceback.
    """
