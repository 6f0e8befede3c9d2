"""The error a user can act on."""


class InputError(ValueError):
    """The user's input is wrong: the message names the place, the value, the bound and the remedy.

    Anything else that is raised is a fault of ours or of the machine and is reported with its traceback.
    """
